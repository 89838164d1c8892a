"""quantize and dequantize as ops: sizes that several threads share, streams, shapes, dtypes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import ops
from oracle import Weight


def quantized(fmt, w: mx.array, **more) -> Weight:
    q = ops.quantize(w, **strategies.format_keywords(fmt), **more)
    return Weight(*(None if a is None else oracle.to_numpy(a) for a in q))


@pytest.mark.parametrize("shape", [(1, 16384), (1031, 256), (7, 11, 640), (2, 3, 4, 384)])
def test_large_tensors(judged_fmt, dtype, shape, rng):
    """One long row, many short ones, batches: every part is written, by whichever thread."""
    w = strategies.activations(rng, shape, dtype)
    got, want = quantized(judged_fmt, oracle.to_mlx(w)), oracle.encode(judged_fmt, w)
    for a, b in zip(got, want, strict=True):
        assert b is None or np.array_equal(oracle.bits_of(a), oracle.bits_of(b))
    y = ops.dequantize(
        *strategies.weight_arrays(want), dtype=mx.float32, **strategies.format_keywords(judged_fmt)
    )
    values = oracle.decode(judged_fmt, want)
    assert y.shape == shape
    assert np.abs(oracle.f64(y) - values).max() <= 2.0**-22 * np.abs(values).max()


@pytest.mark.parametrize("rows", range(1, 10))
def test_odd_row_counts(fmt, rows, rng):
    """MLX fails on nvfp4 where rows * K is no multiple of 32; here any count of groups is right."""
    w = rng.standard_normal((rows, fmt.group_size)).astype(np.float32)
    got, want = quantized(fmt, mx.array(w)), oracle.encode(fmt, w)
    for a, b in zip(got, want, strict=True):
        assert b is None or np.array_equal(oracle.bits_of(a), oracle.bits_of(b))


def test_scales_have_the_dtype_of_w(affine_fmt, dtype):
    q = ops.quantize(
        mx.ones((2, affine_fmt.group_size), dtype), **strategies.format_keywords(affine_fmt)
    )
    assert (q[0].dtype, q[1].dtype, q[2].dtype) == (mx.uint32, dtype, dtype)


def test_scales_of_the_block_formats_are_bytes(scaled_fmt, dtype):
    q = ops.quantize(mx.ones((2, 64), dtype), **strategies.format_keywords(scaled_fmt))
    assert (q[0].dtype, q[1].dtype, q[2]) == (mx.uint32, mx.uint8, None)


def test_result_feeds_mlx_and_back(fmt, rng):
    """What ours quantizes MLX's own op multiplies, and the other way round."""
    keywords = strategies.format_keywords(fmt)
    w = mx.array(rng.standard_normal((24, 4 * fmt.group_size)).astype(np.float32))
    x = mx.array(rng.standard_normal((3, 4 * fmt.group_size)).astype(np.float32))
    ours, theirs = ops.quantize(w, **keywords), mx.quantize(w, **keywords)
    a = mx.quantized_matmul(x, *(v for v in ours if v is not None), **keywords)
    b = ops.quantized_matmul(x, *theirs, **keywords)
    assert np.linalg.norm(oracle.f64(a) - oracle.f64(b)) <= 4e-6 * np.linalg.norm(oracle.f64(a))
