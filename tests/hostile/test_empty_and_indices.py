"""Empty sizes, expert indices out of range, and the ways through MLX's own ops, in child processes."""

from __future__ import annotations

import pytest
from harness import run

SETUP = """
w = mx.random.normal((64, 128)); x = mx.random.normal((2, 128))
FORMATS = [dict(mode=f.mode, bits=f.bits, group_size=f.group_size) for f in formats.FORMATS]
def check(y, shape, value=0.0):
    mx.eval(y)
    assert y.shape == shape, (y.shape, shape)
    assert mx.all(y == value).item(), y
def weight(N, K, f, lead=()):
    words = mx.zeros((*lead, N, K * f["bits"] // 32), mx.uint32)
    s = mx.zeros((*lead, N, K // f["group_size"]), mx.float32 if f["mode"] == "affine" else mx.uint8)
    return (words, s, s) if f["mode"] == "affine" else (words, s)
"""

EMPTY = {
    "no_rows_of_x": "for f in FORMATS: check(ops.quantized_matmul(x[:0], *weight(64, 128, f), **f), (0, 64))",
    "no_rows_of_w": "for f in FORMATS: check(ops.quantized_matmul(x, *weight(0, 128, f), **f), (2, 0))",
    "no_depth": "for f in FORMATS: check(ops.quantized_matmul(x[:, :0], *weight(64, 0, f), **f), (2, 64))",
    "no_depth_with_bias":
        "for f in FORMATS: check(ops.quantized_matmul(x[:, :0], *weight(64, 0, f), bias=mx.full(64, 3.0), **f), (2, 64), 3)",
    "nothing": "for f in FORMATS: check(ops.quantized_matmul(x[:0, :0], *weight(0, 0, f), **f), (0, 0))",
    "no_vector": "for f in FORMATS: check(ops.quantized_matmul(x[0, :0], *weight(64, 0, f), **f), (64,))",
    "untransposed_no_rows_of_w":
        "for f in FORMATS: check(ops.quantized_matmul(x[:, :0], *weight(0, 128, f), transpose=False, **f), (2, 128))",
    "untransposed_no_rows_of_x":
        "for f in FORMATS: check(ops.quantized_matmul(mx.zeros((0, 64)), *weight(64, 128, f), transpose=False, **f), (0, 128))",
    "no_batch": "for f in FORMATS: check(ops.quantized_matmul(mx.zeros((0, 2, 128)), *weight(64, 128, f, (0,)), **f), (0, 2, 64))",
    "no_batch_of_w_broadcast":
        "for f in FORMATS: check(ops.quantized_matmul(mx.zeros((1, 2, 128)), *weight(64, 128, f, (0,)), **f), (0, 2, 64))",
    "qqmm_no_rows": "for f in FORMATS[-2:]: check(ops.qqmm(x[:0], *weight(64, 128, f), **f), (0, 64))",
    "qqmm_no_depth": "for f in FORMATS[-2:]: check(ops.qqmm(x[:, :0], *weight(64, 0, f), **f), (2, 64))",
    "gather_no_indices":
        "for f in FORMATS: check(ops.gather_qmm(x[:, None], *weight(64, 128, f, (3,)), rhs_indices=mx.zeros(0, mx.uint32), "
        "lhs_indices=mx.zeros(0, mx.uint32), **f), (0, 1, 64))",
    "gather_no_rows":
        "for f in FORMATS: check(ops.gather_qmm(mx.zeros((2, 0, 128)), *weight(64, 128, f, (3,)), rhs_indices=mx.array([0, 2]), **f), (2, 0, 64))",
    "gather_no_columns":
        "for f in FORMATS: check(ops.gather_qmm(x[:, None], *weight(0, 128, f, (3,)), rhs_indices=mx.array([0, 2]), **f), (2, 1, 0))",
    "gather_no_depth":
        "for f in FORMATS: check(ops.gather_qmm(x[:, None, :0], *weight(64, 0, f, (3,)), rhs_indices=mx.array([0, 2]), **f), (2, 1, 64))",
    "dequantize_empty": "for f in FORMATS: check(ops.dequantize(*weight(0, 128, f), **f), (0, 128))",
    "quantize_empty": "for f in FORMATS: check(ops.quantize(mx.zeros((0, 128)), **f)[1], (0, 128 // f['group_size']))",
    "linear_no_rows": "check(ops.linear(x[:0], w), (0, 64))",
    "linear_no_depth": "check(ops.linear(x[:, :0], w[:, :0], bias=mx.ones(64)), (2, 64), 1)",
    "linear_no_columns": "check(ops.linear(x, w[:0]), (2, 0))",
    "gradient_of_empty":
        "for f in FORMATS: check(mx.grad(lambda x: ops.quantized_matmul(x, *weight(64, 128, f), **f).sum())(x[:0]), (0, 128))",
    "vmap_of_empty":
        "for f in FORMATS: check(mx.vmap(lambda x: ops.quantized_matmul(x, *weight(64, 128, f), **f))(mx.zeros((3, 0, 128))), (3, 0, 64))",
    "compiled_empty":
        "for f in FORMATS: check(mx.compile(lambda x: ops.quantized_matmul(x, *weight(64, 128, f), **f))(x[:0]), (0, 64))",
    "nan_through":
        "q = ops.quantize(w); y = ops.quantized_matmul(x * float('nan'), *q); assert mx.isnan(y).all().item()",
}  # fmt: skip

# MLX's ops end the process on these; a format or backend that runs them must not.
THROUGH_MLX = {
    "one_bit_no_rows": "q = mx.quantize(w, bits=1); check(ops.quantized_matmul(x[:0], *q, bits=1), (0, 64))",
    "one_bit_no_depth":
        "q = mx.quantize(w, bits=1); check(ops.quantized_matmul(x[:, :0], *(v[:, :0] for v in q), bits=1), (2, 64))",
    "backend_mlx_no_rows":
        "lb.set_backend('mlx'); q = ops.quantize(w); check(ops.quantized_matmul(x[:0], *q), (0, 64))",
    "backend_mlx_no_columns":
        "lb.set_backend('mlx'); q = ops.quantize(w); check(ops.quantized_matmul(x, *(v[:0] for v in q)), (2, 0))",
}  # fmt: skip
THROUGH_MLX_REFUSED = {
    "one_bit_scales_rows": "q = mx.quantize(w, bits=1); mx.eval(ops.quantized_matmul(x, q[0], q[1][:32], q[2][:32], bits=1))",
    "backend_mlx_scales_rows":
        "lb.set_backend('mlx'); q = ops.quantize(w); mx.eval(ops.quantized_matmul(x, q[0], q[1][:32], q[2][:32]))",
    "backend_mlx_qqmm_many_rows": "lb.set_backend('mlx'); q = ops.quantize(w, mode='mxfp8')[:2]; mx.eval(ops.qqmm(x, *q, mode='mxfp8'))",
}  # fmt: skip


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
e = ops.quantize(mx.random.normal((4, 64, 128))); m = ops.quantize(mx.random.normal((4, 64, 128)), mode="mxfp8")[:2]
x = mx.random.normal((3, 2, 128))
ok = mx.array([1, 3, 0])
def pair(lhs=None, rhs=None, **k): return ops.gather_qmm(x, *e, lhs_indices=lhs, rhs_indices=rhs, **k)
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
    **{f"lhs {i}": f"mx.eval(pair(lhs=mx.array([0, 1, {i}]), rhs=ok))" for i in ["3", "-1", "10**7"]},
    "qqmm": "mx.eval(ops.gather_qqmm(x, *m, rhs_indices=mx.array([1, 4, 0]), mode='mxfp8'))",
}
UNCHECKED = {
    **{f"rhs {i}": f"same_but(pair(rhs=mx.array([1, {i}, 0])), {{1}})" for i in BAD_INDICES},
    **{f"lhs {i}": f"same_but(pair(lhs=mx.array([0, 1, {i}]), rhs=ok), {{2}})" for i in ["3", "-1", "10**7"]},
    "uint32_max": "same_but(pair(rhs=mx.array([2**32 - 1, 3, 0], mx.uint32)), {0})",
    "int64": "same_but(pair(rhs=mx.array([1, 3, 2**40], mx.int64)), {2})",
    "all": "assert mx.isnan(pair(rhs=mx.array([9, -9, 4]))).all().item()",
    "sorted_tail": "same_but(pair(rhs=mx.array([1, 3, 77]), sorted_indices=True), {2})",
    "one_row": "y = ops.gather_qmm(x[:, :1], *e, rhs_indices=mx.array([1, 4, 0])); rows(y, {1})",
    "bias": "rows(pair(rhs=mx.array([1, 4, 0]), bias=mx.ones((4, 64))), {1})",
    "untransposed": "rows(ops.gather_qmm(x[..., :64], *e, rhs_indices=mx.array([1, 4, 0]), transpose=False), {1})",
    "qqmm": "rows(ops.gather_qqmm(x, *m, rhs_indices=mx.array([1, 4, 0]), mode='mxfp8'), {1})",
    "bfloat16": "rows(ops.gather_qmm(x.astype(mx.bfloat16), *(v if v.dtype == mx.uint32 else v.astype(mx.bfloat16) for v in e), "
                "rhs_indices=mx.array([1, 4, 0])), {1})",
}  # fmt: skip


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
