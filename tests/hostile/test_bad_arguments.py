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
def spread(v, *shape): return mx.broadcast_to(v[:1] if shape[0] > 1 else v[:1, :1], shape)
def qmm(x, w, s, b=None, **k): mx.eval(ops.quantized_matmul(x, w, s, b, **k))
def deq(w, s, b=None, **k): mx.eval(ops.dequantize(w, s, b, **k))
def gather(x, w, s, b=None, **k): mx.eval(ops.gather_qmm(x, w, s, b, **k))
"""

# Snippet, and words of its message: the argument, what was expected, what came; `a|b` is either.
CASES: dict[str, tuple[str, str]] = {
    # shapes of the weight
    "scales_too_few_rows": ("qmm(x, a[0], a[1][:32], a[2][:32])", "scales 64,2 32,2"),
    "scales_too_many_rows": (
        "qmm(x, a[0], mx.concatenate([a[1]] * 2), mx.concatenate([a[2]] * 2))",
        "scales 64,2 128,2",
    ),
    "scales_too_few_groups": ("qmm(x, a[0], a[1][:, :1], a[2][:, :1])", "scales 64,1"),
    "biases_too_few_rows": ("qmm(x, a[0], a[1], a[2][:1])", "biases 64,2 1,2"),
    "biases_wrong_rank": ("qmm(x, a[0], a[1], a[2].reshape(-1))", "biases 128"),
    "scales_wrong_rank": ("qmm(x, a[0], a[1][None], a[2][None])", "scales 1,64,2"),
    "w_half_a_group": ("qmm(x[:, :100], a[0][:, :12], a[1][:, :1], a[2][:, :1])", "w 64,12 256"),
    "w_width_of_other_bits": ("qmm(x, *a, bits=3)", "w|x 64,16 3"),
    "w_one_dimension": ("qmm(x, a[0][0], a[1][0], a[2][0])", "w 2 16"),
    "w_scalar": ("qmm(x, mx.array(1, mx.uint32), a[1], a[2])", "w dimension|dimensions"),
    # x
    "x_scalar": ("qmm(mx.array(2.0), *a)", "x dimension|dimensions|scalar"),
    "x_short": ("qmm(x[:, :100], *a)", "x 128 2,100"),
    "x_long": ("qmm(mx.zeros((2, 192)), *a)", "x 128 2,192"),
    "x_matches_only_untransposed": ("qmm(mx.zeros((2, 64)), *a)", "x 128 2,64"),
    "x_matches_only_transposed": ("qmm(x, *a, transpose=False)", "x 64 2,128"),
    "x_empty_k_nonempty_w": ("qmm(x[:, :0], *a)", "x 128 2,0"),
    "x_batch_does_not_broadcast": ("qmm(mx.zeros((2, 5, 128)), *e)", "x 2,5,128 3,64"),
    "x_vector_batched_w": ("qmm(x[0], *e)", "x 128 3,64"),
    # dtypes
    "x_int32": ("qmm(x.astype(mx.int32), *a)", "x float32 int32"),
    "x_bool": ("qmm(x > 0, *a)", "x float32 bool"),
    "x_complex64": ("qmm(x.astype(mx.complex64), *a)", "x float32 complex64"),
    "x_float64": ("qmm(x.astype(mx.float64), *a)", "x float32 float64"),
    "w_float32": ("qmm(x, a[0].astype(mx.float32), a[1], a[2])", "w uint32 float32"),
    "w_int32": ("qmm(x, a[0].view(mx.int32), a[1], a[2])", "w uint32 int32"),
    "w_uint8": ("qmm(x, m[0].view(mx.uint8), m[1], mode='mxfp8')", "w uint32 uint8"),
    "scales_int32": ("qmm(x, a[0], a[1].astype(mx.int32), a[2])", "scales float32 int32"),
    "scales_bytes_in_affine": ("qmm(x, a[0], a[1].astype(mx.uint8), a[2])", "scales float32 uint8"),
    "scales_float_in_mxfp8": (
        "qmm(x, m[0], m[1].astype(mx.float32), mode='mxfp8')",
        "scales uint8 float32",
    ),
    "biases_int32": ("qmm(x, a[0], a[1], a[2].astype(mx.int32))", "biases float32 int32"),
    "bias_int32": ("qmm(x, *a, bias=mx.zeros(64, mx.int32))", "bias float32 int32"),
    # presence
    "biases_missing": ("qmm(x, a[0], a[1])", "biases affine None"),
    "biases_in_mxfp8": ("qmm(x, *m, mx.zeros((64, 4)), mode='mxfp8')", "biases None 64,4"),
    "bias_wrong_length": ("qmm(x, *a, bias=mx.zeros(63))", "bias 64 63"),
    "bias_matrix": ("qmm(x, *a, bias=mx.zeros((2, 64)))", "bias 64 2,64"),
    "bias_scalar": ("qmm(x, *a, bias=mx.array(1.0))", "bias 64"),
    # format
    "bits_9": ("qmm(x, *a, bits=9)", "bits 2,3,4 9"),
    "bits_0": ("qmm(x, *a, bits=0)", "bits 0"),
    "bits_7": ("qmm(x, *a, bits=7)", "bits 7"),
    "bits_negative": ("qmm(x, *a, bits=-4)", "bits -4"),
    "bits_text": ("qmm(x, *a, bits='4')", "bits '4'"),
    "bits_bool": ("qmm(x, *a, bits=True)", "bits True"),
    "bits_8_in_nvfp4": ("qmm(x, *n, mode='nvfp4', bits=8)", "bits nvfp4 8"),
    "group_256": ("qmm(x, *a, group_size=256)", "group_size 32,64,128 256"),
    "group_16": ("qmm(x, *a, group_size=16)", "group_size 16"),
    "group_0": ("qmm(x, *a, group_size=0)", "group_size 0"),
    "group_text": ("qmm(x, *a, group_size='64')", "group_size '64'"),
    "group_64_in_mxfp8": ("qmm(x, *m, mode='mxfp8', group_size=64)", "group_size mxfp8 64"),
    "group_of_another_weight": ("qmm(x, *a, group_size=32)", "scales 64,4 64,2"),
    "mode_unknown": ("qmm(x, *a, mode='int4')", "mode affine 'int4'"),
    "mode_none": ("qmm(x, *a, mode=None)", "mode affine None"),
    "mode_of_another_weight": ("qmm(x, *a, mode='nvfp4')", "scales|biases nvfp4"),
    "dequantize_mode_unknown": ("deq(*a, mode='int4')", "mode 'int4'"),
    "quantize_mode_unknown": ("ops.quantize(w, mode='fp8')", "mode 'fp8'"),
    "format_get_unknown": ("formats.get('mxfp16')", "mode 'mxfp16'"),
    # global scales
    "global_scale_in_affine": (
        "qmm(x, *a, global_scale=mx.array(1.0))",
        "global_scale nvfp4 affine",
    ),
    "global_scale_in_mxfp8": (
        "qmm(x, *m, mode='mxfp8', global_scale=mx.array(1.0))",
        "global_scale nvfp4",
    ),
    "global_scale_bfloat16": (
        "qmm(x, *n, mode='nvfp4', global_scale=mx.array(1.0).astype(mx.bfloat16))",
        "global_scale float32 bfloat16",
    ),
    "global_scale_vector": (
        "qmm(x, *n, mode='nvfp4', global_scale=mx.ones(64))",
        "global_scale 64",
    ),
    "global_scale_quantize_mxfp4": (
        "ops.quantize(w, mode='mxfp4', global_scale=mx.array(1.0))",
        "global_scale nvfp4 mxfp4",
    ),
    "global_scale_dequantize_mxfp8": (
        "deq(*m, mode='mxfp8', global_scale=mx.array(1.0))",
        "global_scale nvfp4",
    ),
    "qqmm_one_global_scale": (
        "ops.qqmm(x, *n, mode='nvfp4', global_scale_x=mx.array(1.0))",
        "global_scale_w global_scale_x",
    ),
    "qqmm_other_global_scale": (
        "ops.qqmm(x, *n, mode='nvfp4', global_scale_w=mx.array(1.0))",
        "global_scale_x global_scale_w",
    ),
    "gather_qqmm_one_global_scale": (
        "ops.gather_qqmm(x[:, None], *(v[None] for v in n), mode='nvfp4', rhs_indices=i * 0, "
        "global_scale_x=mx.array(1.0))",
        "global_scale_w global_scale_x",
    ),
    "qqmm_global_scale_mxfp8": (
        "ops.qqmm(x, *m, mode='mxfp8', global_scale_x=mx.array(1.0), global_scale_w=mx.array(1.0))",
        "global_scale_x nvfp4 mxfp8",
    ),
    # activations that cannot be quantized
    "qqmm_affine": ("ops.qqmm(x, a[0], a[1], mode='affine')", "mode 'affine' mxfp8 nvfp4"),
    "qqmm_mxfp4": (
        "ops.qqmm(x, *ops.quantize(w, mode='mxfp4')[:2], mode='mxfp4')",
        "mode mxfp8 nvfp4",
    ),
    "gather_qqmm_affine": (
        "ops.gather_qqmm(x[:, None], e[0], e[1], mode='affine')",
        "mode mxfp8 nvfp4",
    ),
    "qqmm_x_short": ("ops.qqmm(x[:, :96], *m, mode='mxfp8')", "x 128 2,96"),
    "qqmm_bits": ("ops.qqmm(x, *m, mode='mxfp8', bits=4)", "bits 4"),
    # gather
    "gather_x_vector": ("gather(x[0], *e, rhs_indices=i)", "x 2 128"),
    "gather_float_indices": (
        "gather(x[:, None], *e, rhs_indices=i.astype(mx.float32))",
        "rhs_indices integers float32",
    ),
    "gather_bool_indices": (
        "gather(x[:, None], *e, rhs_indices=i > 0)",
        "rhs_indices integers bool",
    ),
    "gather_float_lhs": (
        "gather(x[:, None], *e, lhs_indices=i * 1.0)",
        "lhs_indices integers float32",
    ),
    "gather_indices_do_not_broadcast": (
        "gather(x[:, None], *e, lhs_indices=mx.array([0, 1, 0]), rhs_indices=i)",
        "lhs_indices rhs_indices 3 2",
    ),
    "gather_bias_per_column": (
        "gather(x[:, None], *e, rhs_indices=i, bias=mx.zeros(64))",
        "bias 3,64 64",
    ),
    "gather_scales_of_two_experts": (
        "gather(x[:, None], e[0], e[1][:2], e[2][:2], rhs_indices=i)",
        "scales 3,64,2 2,64,2",
    ),
    "gather_x_short": ("gather(x[:, None, :64], *e, rhs_indices=i)", "x 128 64"),
    # quantize, dequantize
    "quantize_width": ("ops.quantize(mx.zeros((4, 70)))", "w 64 4,70 none"),
    "quantize_width_other_group_fits": ("ops.quantize(mx.zeros((4, 96)))", "w 64 4,96 32"),
    "quantize_vector": ("ops.quantize(mx.zeros(64))", "w 2 64"),
    "quantize_scalar": ("ops.quantize(mx.array(1.0))", "w dimension|dimensions"),
    "quantize_int32": ("ops.quantize(mx.zeros((2, 64), mx.int32))", "w float32 int32"),
    "quantize_complex64": ("ops.quantize(mx.zeros((2, 64), mx.complex64))", "w float32 complex64"),
    "quantize_float64": (
        "ops.quantize(mx.zeros((2, 64)).astype(mx.float64, stream=mx.cpu))",
        "w float32 float64",
    ),
    "dequantize_dtype_int32": ("deq(*a, dtype=mx.int32)", "dtype float32 int32"),
    "dequantize_dtype_float64": ("deq(*a, dtype=mx.float64)", "dtype float32 float64"),
    "dequantize_scales_rows": ("deq(a[0], a[1][:32], a[2][:32])", "scales 64,2 32,2"),
    "dequantize_biases_missing": ("deq(a[0], a[1])", "biases affine"),
    "dequantize_w_float": ("deq(a[1], a[1], a[2])", "w uint32 float32"),
    # linear
    "linear_k": ("ops.linear(x, mx.zeros((5, 64)))", "x 64 2,128"),
    "linear_w_vector": ("ops.linear(x, mx.zeros(128))", "w 2 128"),
    "linear_w_uint32": ("ops.linear(x, mx.zeros((5, 128), mx.uint32))", "w float32 uint32"),
    "linear_x_int32": ("ops.linear(x.astype(mx.int32), w)", "x float32 int32"),
    "linear_x_scalar": ("ops.linear(mx.array(1.0), w)", "x dimension|dimensions|scalar"),
    "linear_bias": ("ops.linear(x, w, bias=mx.zeros(128))", "bias 64 128"),
    # sizes that pass int32
    "columns_wrap_to_zero": (
        "qmm(x[:, :0], spread(a[0], 1, 2**29), spread(a[1], 1, 2**26), spread(a[2], 1, 2**26))",
        "w|x",
    ),
    "columns_pass_int32": (
        "qmm(x, spread(a[0], 1, 2**29), spread(a[1], 1, 2**26), spread(a[2], 1, 2**26))",
        "w|x",
    ),
    "result_passes_int64_memory": (
        "qmm(mx.broadcast_to(x[:1], (2**30, 128)), *(spread(v, 2**20, v.shape[1]) for v in a))",
        "x|memory|large|too",
    ),
    # backend
    "set_backend_unknown": ("lb.set_backend('cuda')", "backend auto 'cuda'"),
    "explain_mode": ("lb.explain(x, *a, mode='int4')", "mode 'int4'"),
    "explain_shape": ("lb.explain(x[:, :64], *a)", "x 128 2,64"),
}

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
    return run({name: code for name, (code, _) in CASES.items()} | TYPE_ERRORS, SETUP)


def says(message: str, words: str) -> bool:
    """Whether a word, or one of `a|b`, stands in `message` by itself; shapes read 64,2."""
    return any(re.search(rf"(?<![\w.-]){re.escape(w)}(?!\w)", message) for w in words.split("|"))


@pytest.mark.parametrize("name", CASES)
def test_refused_by_name(outcomes, name):
    found, words = outcomes[name], CASES[name][1]
    assert found.kind == "ValueError", found
    message = re.sub(r", +", ",", found.message)
    missing = [w for w in words.split() if not says(message, w)]
    assert not missing, f"{missing} not in {message!r}"


@pytest.mark.parametrize("name", TYPE_ERRORS)
def test_type_errors(outcomes, name):
    assert outcomes[name].kind == "TypeError", outcomes[name]


def test_messages_start_with_the_op(outcomes):
    """`[op] ...`: a traceback through a model says which op refused."""
    calls = ("qmm", "deq", "gather", "ops.")
    messages = {n: outcomes[n].message for n, (code, _) in CASES.items() if code.startswith(calls)}
    wrong = {n: text for n, text in messages.items() if not re.match(r"\[\w+\] ", text)}
    assert not wrong, wrong
