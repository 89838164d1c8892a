"""vmap and mx.compile of every op, and the graph facts they rest on."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import ops
from oracle import Weight


def integers(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32
) -> mx.array:
    return oracle.to_mlx(strategies.exact_activations(rng, shape, dtype))


def assert_loop(
    f: Any, in_axes: tuple[int | None, ...], *arrays: mx.array, out_axes: int = 0
) -> None:
    """vmap(f) equals f applied to each slice, to the bit (the operands are exact)."""
    got = mx.vmap(f, in_axes=in_axes, out_axes=out_axes)(*arrays)
    count = next(a.shape[axis] for a, axis in zip(arrays, in_axes, strict=True) if axis is not None)
    one = [
        f(
            *(
                a if axis is None else mx.take(a, i, axis)
                for a, axis in zip(arrays, in_axes, strict=True)
            )
        )
        for i in range(count)
    ]
    want = mx.stack(one, axis=out_axes)
    assert got.shape == want.shape and got.dtype == want.dtype
    assert mx.array_equal(got, want).item()


def exact_arrays(
    fmt: Any, rng: np.random.Generator, N: int, batch: tuple[int, ...] = ()
) -> list[mx.array]:
    """words, scales (and biases) of an exact weight of two groups."""
    w = strategies.exact_weight(rng, fmt, N, 2 * fmt.group_size, mx.float32, batch)
    return [a for a in strategies.weight_arrays(w) if a is not None]


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("transpose", [True, False])
def test_vmap_over_x(fmt, axis, transpose, rng):
    K = 2 * fmt.group_size if transpose else 14
    x = mx.moveaxis(integers(rng, (5, 3, K)), 0, axis)
    weight, keywords = exact_arrays(fmt, rng, 14), strategies.format_keywords(fmt)
    assert_loop(
        lambda x: ops.quantized_matmul(x, *weight, transpose=transpose, **keywords), (axis,), x
    )
    assert_loop(
        lambda x: ops.quantized_matmul(x, *weight, transpose=transpose, **keywords),
        (axis,),
        x,
        out_axes=1,
    )


def test_vmap_over_x_with_a_bias_or_of_vectors(fmt, rng):
    weight, keywords = exact_arrays(fmt, rng, 14), strategies.format_keywords(fmt)
    bias = mx.arange(14.0)
    f = lambda x: ops.quantized_matmul(x, *weight, bias=bias, **keywords)  # noqa: E731
    assert_loop(f, (0,), integers(rng, (4, 2 * fmt.group_size)))
    assert_loop(f, (0,), integers(rng, (4, 2, 3, 2 * fmt.group_size)))


def test_vmap_over_weights(fmt, rng):
    """w, scales and biases batched, x batched or shared; then one of them alone."""
    batched, shared = exact_arrays(fmt, rng, 7, (4,)), exact_arrays(fmt, rng, 7)
    f = lambda x, *w: ops.quantized_matmul(x, *w, **strategies.format_keywords(fmt))  # noqa: E731
    x = integers(rng, (4, 3, 2 * fmt.group_size))
    axes = (0,) * len(batched)
    assert_loop(f, (0, *axes), x, *batched)
    assert_loop(f, (None, *axes), x[0], *batched)
    assert_loop(f, (1, *axes), mx.swapaxes(x, 0, 1), *batched)
    for i in range(len(batched)):
        mixed = [b if i == j else s for j, (b, s) in enumerate(zip(batched, shared, strict=True))]
        assert_loop(f, (None, *(0 if i == j else None for j in range(len(batched)))), x[0], *mixed)


def test_vmap_over_a_bias(fmt, rng):
    weight, keywords = exact_arrays(fmt, rng, 7), strategies.format_keywords(fmt)
    x, bias = integers(rng, (4, 3, 2 * fmt.group_size)), integers(rng, (4, 7))
    f = lambda x, b: ops.quantized_matmul(x, *weight, bias=b, **keywords)  # noqa: E731
    assert_loop(f, (0, 0), x, bias)
    assert_loop(f, (None, 0), x[0], bias)


def test_vmap_twice(fmt, rng):
    weight, keywords = exact_arrays(fmt, rng, 7), strategies.format_keywords(fmt)
    inner = mx.vmap(lambda x: ops.quantized_matmul(x, *weight, **keywords), in_axes=1)
    assert_loop(inner, (2,), integers(rng, (3, 2, 4, 2 * fmt.group_size)))


def test_vmap_of_gather(fmt, rng):
    """Over x, over the indices, over both, and over the experts themselves."""
    weight, keywords = exact_arrays(fmt, rng, 7, (3,)), strategies.format_keywords(fmt)
    x = integers(rng, (5, 4, 2, 2 * fmt.group_size))
    lhs, rhs = mx.array(rng.integers(0, 4, (5, 6))), mx.array(rng.integers(0, 3, (5, 6)))

    def f(x: mx.array, lhs: mx.array, rhs: mx.array, *w: mx.array) -> mx.array:
        return ops.gather_qmm(x, *(w or weight), lhs_indices=lhs, rhs_indices=rhs, **keywords)

    assert_loop(f, (0, None, None), x, lhs[0], rhs[0])
    assert_loop(f, (None, 0, 0), x[0], lhs, rhs)
    assert_loop(f, (None, None, 0), x[0], lhs[0], rhs)
    assert_loop(f, (0, 0, 0), x, lhs, rhs)
    many = exact_arrays(fmt, rng, 7, (5, 3))
    assert_loop(f, (0, 0, 0, *(0,) * len(many)), x, lhs, rhs, *many)


def test_vmap_of_qqmm(qq_fmt, rng):
    weight, keywords = exact_arrays(qq_fmt, rng, 9), strategies.format_keywords(qq_fmt)
    x = integers(rng, (4, 3, 2 * qq_fmt.group_size))
    assert_loop(lambda x: ops.qqmm(x, *weight, **keywords), (0,), x)
    assert_loop(lambda x: ops.qqmm(x, *weight, **keywords), (1,), x)
    K = 3 * qq_fmt.group_size
    weight = strategies.weight_arrays(strategies.exact_weight(rng, qq_fmt, 9, K, mx.bfloat16))[:2]
    many = integers(rng, (2, 20, K), mx.bfloat16)
    assert_loop(lambda x: ops.qqmm(x, *weight, **keywords), (0,), many)


def test_vmap_of_quantize_and_dequantize(fmt, rng):
    keywords = strategies.format_keywords(fmt)
    w = mx.array(rng.standard_normal((3, 4, 2 * fmt.group_size)).astype(np.float32))
    for part in range(3 if fmt.has_biases else 2):
        assert_loop(
            lambda w, i=part: ops.quantize(w, nan_policy="propagate", **keywords)[i], (0,), w
        )
        assert_loop(
            lambda w, i=part: ops.quantize(w, nan_policy="propagate", **keywords)[i], (1,), w
        )
    weight = exact_arrays(fmt, rng, 5, (3,))
    assert_loop(
        lambda *a: ops.dequantize(*a, dtype=mx.float32, **keywords), (0,) * len(weight), *weight
    )


def test_vmap_of_linear(dtype, rng):
    w, bias = integers(rng, (7, 19), dtype), integers(rng, (7,), dtype)
    x = integers(rng, (4, 3, 19), dtype)
    assert_loop(lambda x: ops.linear(x, w, bias=bias), (0,), x)
    assert_loop(lambda x: ops.linear(x, w), (1,), x)


# --- mx.compile -----------------------------------------------------------------------------


def every_op(fmt: Any, rng: np.random.Generator) -> dict[str, tuple[Any, list[mx.array]]]:
    """Name to (function of arrays, arrays): each op that takes `fmt`, its operands as inputs."""
    keywords, K = strategies.format_keywords(fmt), 2 * fmt.group_size
    weight, experts = exact_arrays(fmt, rng, 14), exact_arrays(fmt, rng, 14, (3,))
    x, tokens = integers(rng, (5, K)), integers(rng, (4, 1, K))
    rhs = mx.array([2, 0, 1, 2])
    found = {
        "quantized_matmul": (
            lambda x, *w: ops.quantized_matmul(x, *w, bias=mx.arange(14.0), **keywords),
            [x, *weight],
        ),
        "untransposed": (
            lambda x, *w: ops.quantized_matmul(x, *w, transpose=False, **keywords),
            [x[:, :14], *weight],
        ),
        "gather_qmm": (
            lambda x, *w: ops.gather_qmm(x, *w, rhs_indices=rhs, **keywords),
            [tokens, *experts],
        ),
        "dequantize": (lambda *w: ops.dequantize(*w, **keywords), weight),
        "quantize": (lambda x: ops.quantize(x, nan_policy="propagate", **keywords)[0], [x]),
    }
    if fmt.mode in strategies.QQ_MODES:
        found["qqmm"] = (lambda x, *w: ops.qqmm(x, *w, **keywords), [x, *weight])
        found["gather_qqmm"] = (
            lambda x, *w: ops.gather_qqmm(x, *w, rhs_indices=rhs, **keywords),
            [tokens, *experts],
        )
    return found


def test_compile_changes_nothing(fmt, rng):
    for name, (f, arrays) in every_op(fmt, rng).items():
        assert mx.array_equal(mx.compile(f)(*arrays), f(*arrays)).item(), name


def test_compile_without_shapes(fmt, rng):
    """shapeless=True: traced once with one M, right with every other."""
    for name, (f, arrays) in every_op(fmt, rng).items():
        compiled = mx.compile(f, shapeless=True)
        if name in ("dequantize", "gather_qmm", "gather_qqmm"):
            compiled(*arrays)
            assert mx.array_equal(compiled(*arrays), f(*arrays)).item(), name
            continue
        for rows in (5, 2, 40, 1):
            x = mx.concatenate([arrays[0]] * 8)[:rows]
            assert mx.array_equal(compiled(x, *arrays[1:]), f(x, *arrays[1:])).item(), (name, rows)


def test_compiled_gradient(judged_fmt, rng):
    weight, keywords = exact_arrays(judged_fmt, rng, 14), strategies.format_keywords(judged_fmt)
    loss = lambda x: ops.quantized_matmul(x, *weight, **keywords).square().sum()  # noqa: E731
    x = integers(rng, (3, 2 * judged_fmt.group_size))
    assert mx.array_equal(mx.compile(mx.grad(loss))(x), mx.grad(loss)(x)).item()


def test_equal_inputs_different_ops_are_not_merged(fmt, rng):
    """is_equivalent looks at the parameters: the same arrays, transposed or not, in one graph."""
    K = 2 * fmt.group_size
    w = strategies.exact_weight(rng, fmt, K, K, mx.float32)
    arrays, keywords = strategies.weight_arrays(w), strategies.format_keywords(fmt)
    values = oracle.decode(fmt, w)
    x = integers(rng, (3, K))
    both = mx.compile(
        lambda x: (
            ops.quantized_matmul(x, *arrays, **keywords),
            ops.quantized_matmul(x, *arrays, transpose=False, **keywords),
        )
    )
    straight, crossed = both(x)
    oracle.assert_equal(straight, oracle.f64(x) @ values.T)
    oracle.assert_equal(crossed, oracle.f64(x) @ values)


def test_formats_of_one_shape_are_not_merged(rng):
    """The same words as mxfp8 and as affine 8-bit: only the format tells the nodes apart."""
    from mlx_lowbit import formats

    fp8, affine = formats.get("mxfp8"), formats.get("affine", 8, 32)
    words = mx.array(rng.integers(0, 2**32, (8, 8), dtype=np.uint32) & np.uint32(0x3F3F3F3F))
    one = mx.full((8, 1), 127, mx.uint8)
    both = mx.compile(
        lambda w: (
            ops.dequantize(w, one, dtype=mx.float32, **strategies.format_keywords(fp8)),
            ops.dequantize(
                w, mx.ones((8, 1)), mx.zeros((8, 1)), **strategies.format_keywords(affine)
            ),
        )
    )
    a, b = both(words)
    scale = np.full((8, 1), 127, np.uint8)
    oracle.assert_equal(a, oracle.decode(fp8, Weight(np.array(words), scale)))
    oracle.assert_equal(b, oracle.unpack(np.array(words), 8).astype(np.float64))


def test_inputs_are_not_overwritten(judged_fmt, rng):
    """Outputs never reuse the buffer of x, also where MLX would let them."""
    K = 128
    w = strategies.exact_weight(rng, judged_fmt, K, K, mx.float32)
    arrays, keywords = strategies.weight_arrays(w), strategies.format_keywords(judged_fmt)
    x = integers(rng, (3, K))
    shifted = x + 1
    y = ops.quantized_matmul(shifted, *arrays, **keywords)
    total = y + shifted
    oracle.assert_equal(
        total, oracle.f64(x) + 1 + (oracle.f64(x) + 1) @ oracle.decode(judged_fmt, w).T
    )
