"""explain(): the plan in words, for every format, dtype and kernel, without running anything."""

from __future__ import annotations

import warnings

import mlx.core as mx
import mlx_lowbit
import pytest
import strategies
from mlx_lowbit import _ext, ops


def operands(fmt, M: int, dtype: mx.Dtype, N: int = 64, groups: int = 4) -> tuple[mx.array, ...]:
    K = groups * fmt.group_size
    words = mx.zeros((N, K * fmt.bits // 32), mx.uint32)
    scales = mx.zeros((N, groups), dtype if fmt.has_biases else mx.uint8)
    return (mx.zeros((M, K), dtype), words, scales, *([scales] if fmt.has_biases else []))


def plan(fmt, M: int, dtype: mx.Dtype, **more) -> str:
    return mlx_lowbit.explain(*operands(fmt, M, dtype), **strategies.format_keywords(fmt), **more)


def test_names_kernel_target_and_arithmetic(fmt, dtype):
    """One row is a matvec, a thousand a matmul, both of ours and on the target in use."""
    for M, kernel in ((1, "matvec"), (1000, "matmul")):
        text = plan(fmt, M, dtype)
        assert text.startswith(f"cpu/{kernel} [{_ext.target()}]"), text
        assert "float32" in text and "thread" in text, text


def test_float32_and_float16_never_pass_through_bfloat16(fmt):
    """Their tolerance is below what bfloat16 can hold."""
    for M in (1, 9, 300):
        for dtype in (mx.float32, mx.float16):
            assert "bfloat16" not in plan(fmt, M, dtype)


@pytest.mark.skipif(
    _ext.target() not in ("amx", "amx_emulated", "avx512bf16"), reason="needs AVX-512 VNNI"
)
def test_fixed_point_is_for_integer_codes_and_half_precision(fmt, dtype):
    """Instead of float32 lanes, and never where x has more bits than fixed point keeps."""
    text = plan(fmt, 1, dtype)
    fits = fmt.has_biases and dtype != mx.float32
    assert not fits or "float32 lanes" not in text, text
    assert fits or "fixed point" not in text, text
    if fmt.has_biases and fmt.bits in (6, 8):
        assert ("fixed point" in text) == fits, text


def test_kernel_changes_once_with_the_number_of_rows(fmt, dtype):
    """matvec up to some M, matmul from there on."""
    kernels = ["matvec" in plan(fmt, M, dtype) for M in range(1, 40)]
    assert kernels == sorted(kernels, reverse=True) and kernels[0] and not kernels[-1]


def test_untransposed_is_a_matmul(fmt, dtype):
    x, *weight = operands(fmt, 1, dtype)
    text = mlx_lowbit.explain(
        x[:, :64], *weight, transpose=False, **strategies.format_keywords(fmt)
    )
    assert text.startswith("cpu/matmul"), text


def test_quantized_activations_are_named(qq_fmt, dtype):
    text = plan(qq_fmt, 4, dtype, quantize_activations=True)
    assert "quantized" in text and text.startswith("cpu/"), text


def test_dense(dtype):
    for M, kernel in ((1, "matvec"), (1000, "matmul")):
        text = mlx_lowbit.explain(mx.zeros((M, 96), dtype), mx.zeros((32, 96), dtype))
        assert text.startswith(f"cpu/{kernel} [{_ext.target()}]"), text


def test_runs_nothing(judged_fmt):
    """Operands that could never be computed are planned all the same."""
    x, *weight = operands(judged_fmt, 1, mx.bfloat16)
    broken = mx.zeros((1, 1)) / mx.zeros((3, 1)).reshape(3, 1)  # never evaluated
    x = mx.broadcast_to(broken.astype(mx.bfloat16)[:1], x.shape)
    assert "cpu/" in mlx_lowbit.explain(x, *weight, **strategies.format_keywords(judged_fmt))


def test_same_question_same_answer(fmt, dtype):
    assert plan(fmt, 3, dtype) == plan(fmt, 3, dtype)


def test_missing_format_says_which_and_why():
    """affine 1-bit is MLX's alone: its op runs, with one notice, and explain says so."""
    w = mx.random.normal((16, 64))
    q = mx.quantize(w, bits=1)
    text = mlx_lowbit.explain(w, *q, bits=1)
    assert text.startswith("MLX's op") and "bits" in text and "1" in text, text
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [ops.quantized_matmul(w, *q, bits=1) for _ in range(3)]
    assert len([c for c in caught if "MLX" in str(c.message)]) <= 1
    assert mx.allclose(results[0], mx.quantized_matmul(w, *q, bits=1)).item()


def test_backend_decides(judged_fmt):
    x, *weight = operands(judged_fmt, 1, mx.float32)
    keywords = strategies.format_keywords(judged_fmt)
    before = mlx_lowbit.get_backend()
    try:
        mlx_lowbit.set_backend("mlx")
        assert mlx_lowbit.explain(x, *weight, **keywords).startswith("MLX's op")
        theirs = mx.quantized_matmul(x + 1, *weight, **keywords)
        assert mx.array_equal(ops.quantized_matmul(x + 1, *weight, **keywords), theirs).item()
        mlx_lowbit.set_backend("lowbit")
        assert mlx_lowbit.explain(x, *weight, **keywords).startswith("cpu/")
        with pytest.raises(RuntimeError, match=r"quantized_matmul.*bits"):
            ops.quantized_matmul(mx.zeros((2, 64)), *mx.quantize(mx.zeros((4, 64)), bits=1), bits=1)
    finally:
        mlx_lowbit.set_backend(before)


def test_registry_lists_what_mlx_stores():
    """Names are unique, ids are positions, and every (mode, bits, group) quantizes in MLX too."""
    from mlx_lowbit import formats

    assert [f.id for f in formats.FORMATS] == list(range(len(formats.FORMATS)))
    assert len({f.name for f in formats.FORMATS}) == len(formats.FORMATS)
    kinds = {(f.mode, f.bits, f.group_size) for f in formats.FORMATS}
    want = {("affine", bits, g) for bits in (2, 3, 4, 5, 6, 8) for g in (32, 64, 128)}
    assert kinds == want | {("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)}
    for f in formats.FORMATS:
        assert formats.get(f.mode, f.bits, f.group_size) is f
        packed = mx.quantize(mx.zeros((2, 128)), **strategies.format_keywords(f))
        stored = 32 * packed[0].size + (16 if f.has_biases else 8) * sum(s.size for s in packed[1:])
        assert f.storage_bits == stored / 256, f.name
        assert f.has_biases == (len(packed) == 3)
