"""Empty sizes, expert indices out of range, and the ways through MLX's own ops: child processes."""

from __future__ import annotations

import pytest
from harness import run

SETUP = """
w = mx.random.normal((64, 128)); x = mx.random.normal((2, 128))
FORMATS = [dict(mode=f.mode, bits=f.bits, group_size=f.group_size) for f in formats.FORMATS]
QQ = [f for f in FORMATS if f["mode"] in ("mxfp8", "nvfp4")]

def zeros(*shape, dtype=mx.float32): return mx.zeros(shape, dtype)
def check(y, shape, value=0.0):
    mx.eval(y)
    assert y.shape == shape, (y.shape, shape)
    assert mx.all(y == value).item(), y
def weight(f, *shape):
    *lead, N, K = shape
    words = zeros(*lead, N, K * f["bits"] // 32, dtype=mx.uint32)
    affine = f["mode"] == "affine"
    s = zeros(*lead, N, K // f["group_size"], dtype=mx.float32 if affine else mx.uint8)
    return (words, s, s) if affine else (words, s)
def qmm(x, *shape, to, value=0.0, **more):
    for f in FORMATS: check(ops.quantized_matmul(x, *weight(f, *shape), **more, **f), to, value)
def qqmm(x, *shape, to):
    for f in QQ: check(ops.qqmm(x, *weight(f, *shape), **f), to)
def gather(x, *shape, to, **more):
    for f in FORMATS: check(ops.gather_qmm(x, *weight(f, *shape), **more, **f), to)
def through(transform, x, to):
    for f in FORMATS:
        check(transform(lambda x: ops.quantized_matmul(x, *weight(f, 64, 128), **f))(x), to)
two, none = mx.array([0, 2]), mx.zeros(0, mx.uint32)
"""

EMPTY = {
    "no_rows_of_x": "qmm(x[:0], 64, 128, to=(0, 64))",
    "no_rows_of_w": "qmm(x, 0, 128, to=(2, 0))",
    "no_depth": "qmm(x[:, :0], 64, 0, to=(2, 64))",
    "no_depth_with_bias": "qmm(x[:, :0], 64, 0, bias=mx.full(64, 3.0), to=(2, 64), value=3)",
    "nothing": "qmm(x[:0, :0], 0, 0, to=(0, 0))",
    "no_vector": "qmm(x[0, :0], 64, 0, to=(64,))",
    "untransposed_no_depth": "qmm(x[:, :0], 0, 128, transpose=False, to=(2, 128))",
    "untransposed_no_rows": "qmm(zeros(0, 64), 64, 128, transpose=False, to=(0, 128))",
    "no_batch": "qmm(zeros(0, 2, 128), 0, 64, 128, to=(0, 2, 64))",
    "no_batch_of_w": "qmm(zeros(1, 2, 128), 0, 64, 128, to=(0, 2, 64))",
    "qqmm_no_rows": "qqmm(x[:0], 64, 128, to=(0, 64))",
    "qqmm_no_depth": "qqmm(x[:, :0], 64, 0, to=(2, 64))",
    "gather_no_indices": "gather(x[:, None], 3, 64, 128, lhs_indices=none, rhs_indices=none, "
    "to=(0, 1, 64))",
    "gather_no_rows": "gather(zeros(2, 0, 128), 3, 64, 128, rhs_indices=two, to=(2, 0, 64))",
    "gather_no_columns": "gather(x[:, None], 3, 0, 128, rhs_indices=two, to=(2, 1, 0))",
    "gather_no_depth": "gather(x[:, None, :0], 3, 64, 0, rhs_indices=two, to=(2, 1, 64))",
    "dequantize": "for f in FORMATS: check(ops.dequantize(*weight(f, 0, 128), **f), (0, 128))",
    "quantize": "for f in FORMATS: check(ops.quantize(zeros(0, 128), **f)[1], "
    "(0, 128 // f['group_size']))",
    "linear_no_rows": "check(ops.linear(x[:0], w), (0, 64))",
    "linear_no_depth": "check(ops.linear(x[:, :0], w[:, :0], bias=mx.ones(64)), (2, 64), 1)",
    "linear_no_columns": "check(ops.linear(x, w[:0]), (2, 0))",
    "gradient": "through(lambda f: mx.grad(lambda x: f(x).sum()), x[:0], (0, 128))",
    "vmap": "through(mx.vmap, zeros(3, 0, 128), (3, 0, 64))",
    "compiled": "through(mx.compile, x[:0], (0, 64))",
    "nan_rows": "y = ops.quantized_matmul(x * float('nan'), *ops.quantize(w)); "
    "assert mx.isnan(y).all().item()",
}

# MLX's ops end the process on these; a format or a backend that runs them must not.
ONE_BIT = "q = mx.quantize(w, bits=1); "
MLX_BACKEND = "lb.set_backend('mlx'); q = ops.quantize(w); "
SHORT_SCALES = "mx.eval(ops.quantized_matmul(x, q[0], q[1][:32], q[2][:32]"
THROUGH_MLX = {
    "one_bit_no_rows": ONE_BIT + "check(ops.quantized_matmul(x[:0], *q, bits=1), (0, 64))",
    "one_bit_no_depth": ONE_BIT + "q = [v[:, :0] for v in q]; "
    "check(ops.quantized_matmul(x[:, :0], *q, bits=1), (2, 64))",
    "backend_mlx_no_rows": MLX_BACKEND + "check(ops.quantized_matmul(x[:0], *q), (0, 64))",
    "backend_mlx_no_columns": MLX_BACKEND + "q = [v[:0] for v in q]; "
    "check(ops.quantized_matmul(x, *q), (2, 0))",
}
THROUGH_MLX_REFUSED = {
    "one_bit_scales_rows": ONE_BIT + SHORT_SCALES + ", bits=1))",
    "backend_mlx_scales_rows": MLX_BACKEND + SHORT_SCALES + "))",
    "backend_mlx_qqmm_rows": "lb.set_backend('mlx'); q = ops.quantize(w, mode='mxfp8')[:2]; "
    "mx.eval(ops.qqmm(x, *q, mode='mxfp8'))",
}


@pytest.fixture(scope="module")
def outcomes():
    return run(EMPTY | THROUGH_MLX | THROUGH_MLX_REFUSED, SETUP)


@pytest.mark.parametrize("name", [*EMPTY, *THROUGH_MLX])
def test_right_result(outcomes, name):
    assert outcomes[name].kind == "returned", outcomes[name]


@pytest.mark.parametrize("name", THROUGH_MLX_REFUSED)
def test_mlx_defects_do_not_pass_through(outcomes, name):
    assert outcomes[name].kind in ("ValueError", "RuntimeError"), outcomes[name]


# --- indices ----------------------------------------------------------------------------------

EXPERTS = """
dense = mx.random.normal((4, 64, 128)); x = mx.random.normal((3, 2, 128))
e = ops.quantize(dense); m = ops.quantize(dense, mode="mxfp8")[:2]
half = ops.quantize(dense.astype(mx.bfloat16))
ok, bad = mx.array([1, 3, 0]), mx.array([1, 4, 0])
def pair(lhs=None, rhs=None, **k):
    return ops.gather_qmm(x, *e, lhs_indices=lhs, rhs_indices=rhs, **k)
def rows(y, bad):  # exactly the pairs of `bad` are NaN
    nan = mx.isnan(y)
    for i in range(y.shape[0]):
        assert mx.all(nan[i] if i in bad else ~nan[i]).item(), (i, y[i])
right = pair(rhs=ok)
def same_but(y, bad):
    rows(y, bad)
    for i in range(3):
        if i not in bad: assert mx.array_equal(y[i], right[i]).item(), i
"""

BAD_INDICES = ["4", "1000", "10**7", "2**31 - 1", "-1", "-2**31"]
CHECKED = {
    **{f"rhs {i}": f"mx.eval(pair(rhs=mx.array([1, {i}, 0])))" for i in BAD_INDICES},
    **{
        f"lhs {i}": f"mx.eval(pair(lhs=mx.array([0, 1, {i}]), rhs=ok))"
        for i in ["3", "-1", "10**7"]
    },
    "qqmm": "mx.eval(ops.gather_qqmm(x, *m, rhs_indices=bad, mode='mxfp8'))",
}
UNCHECKED = {
    **{f"rhs {i}": f"same_but(pair(rhs=mx.array([1, {i}, 0])), {{1}})" for i in BAD_INDICES},
    **{
        f"lhs {i}": f"same_but(pair(lhs=mx.array([0, 1, {i}]), rhs=ok), {{2}})"
        for i in ["3", "-1", "10**7"]
    },
    "uint32_max": "same_but(pair(rhs=mx.array([2**32 - 1, 3, 0], mx.uint32)), {0})",
    "int64": "same_but(pair(rhs=mx.array([1, 3, 2**40], mx.int64)), {2})",
    "all": "assert mx.isnan(pair(rhs=mx.array([9, -9, 4]))).all().item()",
    "sorted_tail": "same_but(pair(rhs=mx.array([1, 3, 77]), sorted_indices=True), {2})",
    "one_row": "rows(ops.gather_qmm(x[:, :1], *e, rhs_indices=bad), {1})",
    "bias": "rows(pair(rhs=bad, bias=mx.ones((4, 64))), {1})",
    "untransposed": "rows(ops.gather_qmm(x[..., :64], *e, rhs_indices=bad, transpose=False), {1})",
    "qqmm": "rows(ops.gather_qqmm(x, *m, rhs_indices=bad, mode='mxfp8'), {1})",
    "bfloat16": "rows(ops.gather_qmm(x.astype(mx.bfloat16), *half, rhs_indices=bad), {1})",
}


@pytest.fixture(scope="module")
def checked():
    return run(CHECKED, SETUP + EXPERTS, {"MLX_LOWBIT_CHECK": "1"})


@pytest.fixture(scope="module")
def unchecked():
    return run(UNCHECKED, SETUP + EXPERTS, {"MLX_LOWBIT_CHECK": "0"})


@pytest.mark.parametrize("name", CHECKED)
def test_index_out_of_range_is_refused_when_checked(checked, name):
    found = checked[name]
    argument = "lhs_indices" if name.startswith("lhs") else "rhs_indices"
    assert found.kind == "ValueError" and argument in found.message, found
    assert name.split()[-1] in found.message or not name[-1].isdigit() or "*" in name, found


@pytest.mark.parametrize("name", UNCHECKED)
def test_index_out_of_range_gives_nan_rows(unchecked, name):
    assert unchecked[name].kind == "returned", unchecked[name]
