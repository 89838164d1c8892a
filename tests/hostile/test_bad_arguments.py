"""Every bad argument gives a Python exception that names it, what was expected and what came.

On several of these MLX's own ops end the process (SIGFPE, SIGSEGV) or read out of bounds.
"""

from __future__ import annotations

import re

import pytest
from harness import run

SETUP = """
w = mx.random.normal((64, 128)); x = mx.random.normal((2, 128))
a = ops.quantize(w)                                # affine, 4 bits, groups of 64
m = ops.quantize(w, mode="mxfp8")[:2]
n = ops.quantize(w, mode="nvfp4")[:2]
e = ops.quantize(mx.random.normal((3, 64, 128)))   # three experts
i = mx.array([0, 2])
def qmm(x, w, s, b=None, **k): mx.eval(ops.quantized_matmul(x, w, s, b, **k))
def deq(w, s, b=None, **k): mx.eval(ops.dequantize(w, s, b, **k))
def gather(x, w, s, b=None, **k): mx.eval(ops.gather_qmm(x, w, s, b, **k))
"""

# snippet, and regular expressions that its message must contain: the argument, what came, ...
CASES: list[tuple[str, str, tuple[str, ...]]] = [
    # shapes of the weight
    ("scales_too_few_rows", "qmm(x, a[0], a[1][:32], a[2][:32])", (r"\bscales\b", r"64, ?2", r"32, ?2")),
    ("scales_too_many_rows", "qmm(x, a[0], mx.concatenate([a[1]] * 2), mx.concatenate([a[2]] * 2))",
     (r"\bscales\b", r"64, ?2", r"128, ?2")),
    ("scales_too_few_groups", "qmm(x, a[0], a[1][:, :1], a[2][:, :1])", (r"\bscales\b", r"64, ?1")),
    ("biases_too_few_rows", "qmm(x, a[0], a[1], a[2][:1])", (r"\bbiases\b", r"64, ?2", r"1, ?2")),
    ("biases_wrong_rank", "qmm(x, a[0], a[1], a[2].reshape(-1))", (r"\bbiases\b", r"128")),
    ("scales_wrong_rank", "qmm(x, a[0], a[1][None], a[2][None])", (r"\bscales\b", r"1, ?64, ?2")),
    ("w_half_a_group", "qmm(x[:, :100], a[0][:, :12], a[1][:, :1], a[2][:, :1])", (r"\bw\b", r"64, ?12", r"256")),
    ("w_width_of_other_bits", "qmm(x, *a, bits=3)", (r"\bw\b|\bx\b", r"64, ?16", r"3")),
    ("w_one_dimension", "qmm(x, a[0][0], a[1][0], a[2][0])", (r"\bw\b", r"2 dim", r"16")),
    ("w_scalar", "qmm(x, mx.array(1, mx.uint32), a[1], a[2])", (r"\bw\b", r"dimension")),
    # x
    ("x_scalar", "qmm(mx.array(2.0), *a)", (r"\bx\b", r"dimension|scalar")),
    ("x_short", "qmm(x[:, :100], *a)", (r"\bx\b", r"128", r"2, ?100")),
    ("x_long", "qmm(mx.zeros((2, 192)), *a)", (r"\bx\b", r"128", r"2, ?192")),
    ("x_matches_only_untransposed", "qmm(mx.zeros((2, 64)), *a)", (r"\bx\b", r"128", r"2, ?64")),
    ("x_matches_only_transposed", "qmm(x, *a, transpose=False)", (r"\bx\b", r"64", r"2, ?128")),
    ("x_empty_k_nonempty_w", "qmm(x[:, :0], *a)", (r"\bx\b", r"128", r"2, ?0")),
    ("x_batch_does_not_broadcast", "qmm(mx.zeros((2, 5, 128)), *e)", (r"\bx\b", r"2, ?5, ?128", r"3, ?64")),
    ("x_vector_batched_w", "qmm(x[0], *e)", (r"\bx\b", r"128", r"3, ?64")),
    # dtypes
    ("x_int32", "qmm(x.astype(mx.int32), *a)", (r"\bx\b", r"float32", r"int32")),
    ("x_bool", "qmm(x > 0, *a)", (r"\bx\b", r"float32", r"bool")),
    ("x_complex64", "qmm(x.astype(mx.complex64), *a)", (r"\bx\b", r"float32", r"complex64")),
    ("x_float64", "qmm(x.astype(mx.float64), *a)", (r"\bx\b", r"float32", r"float64")),
    ("w_float32", "qmm(x, a[0].astype(mx.float32), a[1], a[2])", (r"\bw\b", r"uint32", r"float32")),
    ("w_int32", "qmm(x, a[0].view(mx.int32), a[1], a[2])", (r"\bw\b", r"uint32", r"int32")),
    ("w_uint8", "qmm(x, m[0].view(mx.uint8), m[1], mode='mxfp8')", (r"\bw\b", r"uint32", r"uint8")),
    ("scales_int32", "qmm(x, a[0], a[1].astype(mx.int32), a[2])", (r"\bscales\b", r"float32", r"int32")),
    ("scales_bytes_in_affine", "qmm(x, a[0], a[1].astype(mx.uint8), a[2])", (r"\bscales\b", r"float32", r"uint8")),
    ("scales_float_in_mxfp8", "qmm(x, m[0], m[1].astype(mx.float32), mode='mxfp8')", (r"\bscales\b", r"uint8", r"float32")),
    ("biases_int32", "qmm(x, a[0], a[1], a[2].astype(mx.int32))", (r"\bbiases\b", r"float32", r"int32")),
    ("bias_int32", "qmm(x, *a, bias=mx.zeros(64, mx.int32))", (r"\bbias\b", r"float32", r"int32")),
    # presence
    ("biases_missing", "qmm(x, a[0], a[1])", (r"\bbiases\b", r"affine", r"None")),
    ("biases_in_mxfp8", "qmm(x, *m, mx.zeros((64, 4)), mode='mxfp8')", (r"\bbiases\b", r"None", r"64, ?4")),
    ("bias_wrong_length", "qmm(x, *a, bias=mx.zeros(63))", (r"\bbias\b", r"64", r"63")),
    ("bias_matrix", "qmm(x, *a, bias=mx.zeros((2, 64)))", (r"\bbias\b", r"64", r"2, ?64")),
    ("bias_scalar", "qmm(x, *a, bias=mx.array(1.0))", (r"\bbias\b", r"64")),
    # format
    ("bits_9", "qmm(x, *a, bits=9)", (r"\bbits\b", r"2, 3, 4", r"9")),
    ("bits_0", "qmm(x, *a, bits=0)", (r"\bbits\b", r"0")),
    ("bits_7", "qmm(x, *a, bits=7)", (r"\bbits\b", r"7")),
    ("bits_negative", "qmm(x, *a, bits=-4)", (r"\bbits\b", r"-4")),
    ("bits_text", "qmm(x, *a, bits='4')", (r"\bbits\b", r"'4'")),
    ("bits_bool", "qmm(x, *a, bits=True)", (r"\bbits\b", r"True")),
    ("bits_8_in_nvfp4", "qmm(x, *n, mode='nvfp4', bits=8)", (r"\bbits\b", r"nvfp4", r"8")),
    ("group_256", "qmm(x, *a, group_size=256)", (r"\bgroup_size\b", r"32, 64, 128", r"256")),
    ("group_16", "qmm(x, *a, group_size=16)", (r"\bgroup_size\b", r"16")),
    ("group_0", "qmm(x, *a, group_size=0)", (r"\bgroup_size\b", r"0")),
    ("group_text", "qmm(x, *a, group_size='64')", (r"\bgroup_size\b", r"'64'")),
    ("group_64_in_mxfp8", "qmm(x, *m, mode='mxfp8', group_size=64)", (r"\bgroup_size\b", r"mxfp8", r"64")),
    ("group_of_another_weight", "qmm(x, *a, group_size=32)", (r"\bscales\b", r"64, ?4", r"64, ?2")),
    ("mode_unknown", "qmm(x, *a, mode='int4')", (r"\bmode\b", r"affine", r"'int4'")),
    ("mode_none", "qmm(x, *a, mode=None)", (r"\bmode\b", r"affine", r"None")),
    ("mode_of_another_weight", "qmm(x, *a, mode='nvfp4')", (r"\bscales\b|\bbiases\b", r"nvfp4")),
    ("dequantize_mode_unknown", "deq(*a, mode='int4')", (r"\bmode\b", r"'int4'")),
    ("quantize_mode_unknown", "ops.quantize(w, mode='fp8')", (r"\bmode\b", r"'fp8'")),
    ("format_get_unknown", "formats.get('mxfp16')", (r"\bmode\b", r"'mxfp16'")),
    # global scales
    ("global_scale_in_affine", "qmm(x, *a, global_scale=mx.array(1.0))", (r"\bglobal_scale\b", r"nvfp4", r"affine")),
    ("global_scale_in_mxfp8", "qmm(x, *m, mode='mxfp8', global_scale=mx.array(1.0))", (r"\bglobal_scale\b", r"nvfp4")),
    ("global_scale_bfloat16", "qmm(x, *n, mode='nvfp4', global_scale=mx.array(1.0).astype(mx.bfloat16))",
     (r"\bglobal_scale\b", r"float32", r"bfloat16")),
    ("global_scale_vector", "qmm(x, *n, mode='nvfp4', global_scale=mx.ones(64))", (r"\bglobal_scale\b", r"64")),
    ("global_scale_quantize_mxfp4", "ops.quantize(w, mode='mxfp4', global_scale=mx.array(1.0))",
     (r"\bglobal_scale\b", r"nvfp4", r"mxfp4")),
    ("global_scale_dequantize_mxfp8", "deq(*m, mode='mxfp8', global_scale=mx.array(1.0))", (r"\bglobal_scale\b", r"nvfp4")),
    ("qqmm_one_global_scale", "ops.qqmm(x, *n, mode='nvfp4', global_scale_x=mx.array(1.0))",
     (r"\bglobal_scale_w\b", r"global_scale_x")),
    ("qqmm_other_global_scale", "ops.qqmm(x, *n, mode='nvfp4', global_scale_w=mx.array(1.0))",
     (r"\bglobal_scale_x\b", r"global_scale_w")),
    ("gather_qqmm_one_global_scale",
     "ops.gather_qqmm(x[:, None], *(v[None] for v in n), mode='nvfp4', rhs_indices=mx.zeros(2, mx.uint32), "
     "global_scale_x=mx.array(1.0))", (r"\bglobal_scale_w\b", r"global_scale_x")),
    ("qqmm_global_scale_mxfp8",
     "ops.qqmm(x, *m, mode='mxfp8', global_scale_x=mx.array(1.0), global_scale_w=mx.array(1.0))",
     (r"\bglobal_scale_x\b", r"nvfp4", r"mxfp8")),
    # activations that cannot be quantized
    ("qqmm_affine", "ops.qqmm(x, a[0], a[1], mode='affine')", (r"\bmode\b", r"'affine'", r"mxfp8", r"nvfp4")),
    ("qqmm_mxfp4", "ops.qqmm(x, *ops.quantize(w, mode='mxfp4')[:2], mode='mxfp4')", (r"\bmode\b", r"mxfp8", r"nvfp4")),
    ("gather_qqmm_affine", "ops.gather_qqmm(x[:, None], e[0], e[1], mode='affine')", (r"\bmode\b", r"mxfp8", r"nvfp4")),
    ("qqmm_x_short", "ops.qqmm(x[:, :96], *m, mode='mxfp8')", (r"\bx\b", r"128", r"2, ?96")),
    ("qqmm_bits", "ops.qqmm(x, *m, mode='mxfp8', bits=4)", (r"\bbits\b", r"4")),
    # gather
    ("gather_x_vector", "gather(x[0], *e, rhs_indices=i)", (r"\bx\b", r"2 dim", r"128")),
    ("gather_float_indices", "gather(x[:, None], *e, rhs_indices=i.astype(mx.float32))", (r"\brhs_indices\b", r"integer", r"float32")),
    ("gather_bool_indices", "gather(x[:, None], *e, rhs_indices=i > 0)", (r"\brhs_indices\b", r"integer", r"bool")),
    ("gather_float_lhs", "gather(x[:, None], *e, lhs_indices=i * 1.0)", (r"\blhs_indices\b", r"integer", r"float32")),
    ("gather_indices_do_not_broadcast", "gather(x[:, None], *e, lhs_indices=mx.array([0, 1, 0]), rhs_indices=i)",
     (r"\blhs_indices\b", r"\brhs_indices\b", r"3", r"2")),
    ("gather_bias_per_column", "gather(x[:, None], *e, rhs_indices=i, bias=mx.zeros(64))", (r"\bbias\b", r"3, ?64", r"64")),
    ("gather_scales_of_two_experts", "gather(x[:, None], e[0], e[1][:2], e[2][:2], rhs_indices=i)",
     (r"\bscales\b", r"3, ?64, ?2", r"2, ?64, ?2")),
    ("gather_x_short", "gather(x[:, None, :64], *e, rhs_indices=i)", (r"\bx\b", r"128", r"64")),
    # quantize, dequantize
    ("quantize_width", "ops.quantize(mx.zeros((4, 70)))", (r"\bw\b", r"64", r"4, ?70", r"none")),
    ("quantize_width_other_group_fits", "ops.quantize(mx.zeros((4, 96)))", (r"\bw\b", r"64", r"4, ?96", r"\b32\b")),
    ("quantize_vector", "ops.quantize(mx.zeros(64))", (r"\bw\b", r"2 dim", r"64")),
    ("quantize_scalar", "ops.quantize(mx.array(1.0))", (r"\bw\b", r"dimension")),
    ("quantize_int32", "ops.quantize(mx.zeros((2, 64), mx.int32))", (r"\bw\b", r"float32", r"int32")),
    ("quantize_complex64", "ops.quantize(mx.zeros((2, 64), mx.complex64))", (r"\bw\b", r"float32", r"complex64")),
    ("quantize_float64", "ops.quantize(mx.zeros((2, 64)).astype(mx.float64, stream=mx.cpu))", (r"\bw\b", r"float32", r"float64")),
    ("dequantize_dtype_int32", "deq(*a, dtype=mx.int32)", (r"\bdtype\b", r"float32", r"int32")),
    ("dequantize_dtype_float64", "deq(*a, dtype=mx.float64)", (r"\bdtype\b", r"float32", r"float64")),
    ("dequantize_scales_rows", "deq(a[0], a[1][:32], a[2][:32])", (r"\bscales\b", r"64, ?2", r"32, ?2")),
    ("dequantize_biases_missing", "deq(a[0], a[1])", (r"\bbiases\b", r"affine")),
    ("dequantize_w_float", "deq(a[1], a[1], a[2])", (r"\bw\b", r"uint32", r"float32")),
    # linear
    ("linear_k", "ops.linear(x, mx.zeros((5, 64)))", (r"\bx\b", r"64", r"2, ?128")),
    ("linear_w_vector", "ops.linear(x, mx.zeros(128))", (r"\bw\b", r"2 dim", r"128")),
    ("linear_w_uint32", "ops.linear(x, mx.zeros((5, 128), mx.uint32))", (r"\bw\b", r"float32", r"uint32")),
    ("linear_x_int32", "ops.linear(x.astype(mx.int32), w)", (r"\bx\b", r"float32", r"int32")),
    ("linear_x_scalar", "ops.linear(mx.array(1.0), w)", (r"\bx\b", r"dimension|scalar")),
    ("linear_bias", "ops.linear(x, w, bias=mx.zeros(128))", (r"\bbias\b", r"64", r"128")),
    # sizes that pass int32
    ("columns_pass_int32",
     "qmm(mx.zeros((1, 2**28 * 8)[:1] + (64,)), mx.broadcast_to(mx.zeros((1, 1), mx.uint32), (1, 2**29)), "
     "mx.broadcast_to(mx.zeros((1, 1)), (1, 2**26)), mx.broadcast_to(mx.zeros((1, 1)), (1, 2**26)))", (r"\bw\b|\bx\b",)),
    ("result_passes_int64_memory",
     "qmm(mx.broadcast_to(x[:1], (2**30, 128)), *(mx.broadcast_to(v[:1], (2**20, *v.shape[1:])) for v in a))",
     (r"\bx\b|memory|large|too",)),
    # backend
    ("set_backend_unknown", "lb.set_backend('cuda')", (r"\bbackend\b", r"auto", r"'cuda'")),
    ("explain_mode", "lb.explain(x, *a, mode='int4')", (r"\bmode\b", r"'int4'")),
    ("explain_shape", "lb.explain(x[:, :64], *a)", (r"\bx\b", r"128", r"2, ?64")),
]  # fmt: skip

# Not an array, or a missing argument: Python's own TypeError says it.
TYPE_ERRORS = {
    "x_is_numpy_text": "qmm('x', *a)",
    "w_is_none": "qmm(x, None, a[1], a[2])",
    "scales_missing": "ops.quantized_matmul(x, a[0])",
    "mode_missing_in_qqmm": "ops.qqmm(x, *m)",
    "positional_mode": "ops.quantized_matmul(x, *a, 64, 4)",
    "unknown_keyword": "ops.quantized_matmul(x, *a, groups=64)",
}


@pytest.fixture(scope="module")
def outcomes():
    return run({name: code for name, code, _ in CASES} | TYPE_ERRORS, SETUP)


@pytest.mark.parametrize("name, patterns", [(name, patterns) for name, _, patterns in CASES], ids=[c[0] for c in CASES])
def test_refused_by_name(outcomes, name, patterns):
    found = outcomes[name]
    assert found.kind == "ValueError", found
    missing = [p for p in patterns if not re.search(p, found.message)]
    assert not missing, f"{missing} not in {found.message!r}"


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_type_errors(outcomes, name):
    assert outcomes[name].kind == "TypeError", outcomes[name]


def test_messages_start_with_the_op(outcomes):
    """`[op] ...`: a traceback through a model says which op refused."""
    wrong = {n: outcomes[n].message for n, code, _ in CASES
             if code.startswith(("qmm", "deq", "gather", "ops.")) and not re.match(r"\[\w+\] ", outcomes[n].message)}  # fmt: skip
    assert not wrong, wrong
