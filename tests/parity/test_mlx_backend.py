"""set_backend("mlx"): every function gives what MLX's own op gives, with the extras ours have."""

from __future__ import annotations

import mlx.core as mx
import mlx_lowbit
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import ops


@pytest.fixture(autouse=True)
def _mlx_backend():
    before = mlx_lowbit.get_backend()
    mlx_lowbit.set_backend("mlx")
    yield
    mlx_lowbit.set_backend(before)


def same(a: mx.array, b: mx.array) -> bool:
    return a.dtype == b.dtype and mx.array_equal(a, b, equal_nan=True).item()


def test_quantize_and_dequantize(fmt, dtype):
    keywords = strategies.format_keywords(fmt)
    w = mx.random.normal((6, 4 * fmt.group_size)).astype(dtype)
    ours, theirs = ops.quantize(w, **keywords), mx.quantize(w, **keywords)
    assert len(ours) == 3 and (ours[2] is None) == (len(theirs) == 2)
    assert all(same(a, b) for a, b in zip(ours, theirs, strict=False) if a is not None)
    assert same(ops.dequantize(*ours, **keywords), mx.dequantize(*theirs, **keywords))


def test_quantized_matmul(fmt):
    keywords = strategies.format_keywords(fmt)
    q = mx.quantize(mx.random.normal((16, 2 * fmt.group_size)), **keywords)
    x = mx.random.normal((3, 2 * fmt.group_size))
    plain = mx.quantized_matmul(x, *q, **keywords)
    assert same(ops.quantized_matmul(x, *q, **keywords), plain)
    bias = mx.arange(16.0)
    assert same(ops.quantized_matmul(x, *q, bias=bias, **keywords), plain + bias)
    y = ops.quantized_matmul(x[:, :16], *q, transpose=False, **keywords)
    assert same(y, mx.quantized_matmul(x[:, :16], *q, transpose=False, **keywords))


def test_gather(fmt):
    keywords = strategies.format_keywords(fmt)
    q = mx.quantize(mx.random.normal((3, 16, 2 * fmt.group_size)), **keywords)
    x, rhs = mx.random.normal((4, 1, 2 * fmt.group_size)), mx.array([2, 0, 0, 1])
    plain = mx.gather_qmm(x, *q, rhs_indices=rhs, **keywords)
    assert same(ops.gather_qmm(x, *q, rhs_indices=rhs, **keywords), plain)
    bias = mx.random.normal((3, 16))
    y = ops.gather_qmm(x, *q, rhs_indices=rhs, bias=bias, **keywords)
    assert same(y, plain + bias[rhs][:, None])


def test_global_scale_enters(nv_fmt, rng):
    """MLX's product has none; the factor is applied to its result."""
    w = strategies.exact_weight(rng, nv_fmt, 16, 64, mx.float32)
    x = strategies.exact_activations(rng, (3, 64), mx.float32)
    y = ops.quantized_matmul(
        mx.array(x),
        *strategies.weight_arrays(w),
        global_scale=mx.array(2688.0 * 4),
        **strategies.format_keywords(nv_fmt),
    )
    oracle.assert_equal(y, oracle.f64(x) @ oracle.decode(nv_fmt, w, 2688.0 * 4).T)


def test_linear(dtype):
    x, w, bias = (mx.random.normal(shape).astype(dtype) for shape in ((3, 40), (7, 40), (7,)))
    assert same(ops.linear(x, w, bias=bias), x @ w.T + bias)


def test_qqmm_of_one_row(qq_fmt):
    """What MLX's CPU op has; more rows are refused by it (tests/hostile)."""
    keywords = strategies.format_keywords(qq_fmt)
    q = mx.quantize(mx.random.normal((16, 64)), **keywords)
    x = mx.random.normal((1, 64))
    assert same(ops.qqmm(x, *q, **keywords), mx.qqmm(x, *q, **keywords))
    assert np.isfinite(oracle.f64(ops.qqmm(x, *q, bias=mx.ones(16), **keywords))).all()
