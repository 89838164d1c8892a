"""dequantize: every code with every scale, against numpy and ml_dtypes."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit import ops
from oracle import Weight


def every_code(fmt: Any, rows: int) -> np.ndarray:
    """uint8 [rows, K]: all codes in order, repeated to whole groups."""
    width = -(-(2**fmt.bits) // fmt.group_size) * fmt.group_size
    return np.broadcast_to(np.resize(np.arange(2**fmt.bits, dtype=np.uint8), width), (rows, width))


def dequantize(fmt: Any, w: Weight, layout: str = "contiguous", **keywords: Any) -> mx.array:
    arrays = strategies.weight_arrays(w, layout)
    return ops.dequantize(*arrays, **strategies.format_keywords(fmt), **keywords)


def test_every_code_and_scale_byte(scaled_fmt, dtype):
    """The exact product, rounded once to `dtype`; 256 scale bytes by all codes."""
    codes = every_code(scaled_fmt, 256)
    groups = codes.shape[1] // scaled_fmt.group_size
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], groups, 1)
    w = Weight(oracle.pack(codes, scaled_fmt.bits), scales)
    y = dequantize(scaled_fmt, w, dtype=dtype)
    assert y.dtype == dtype
    want = oracle.rounded(oracle.decode(scaled_fmt, w), dtype)
    got = oracle.f64(y)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.signbit(got[want == 0]), np.signbit(want[want == 0]))


def test_every_code_of_affine(affine_fmt, dtype):
    """Scales that are powers of two and biases on the grid: s * q + b is exact in every dtype."""
    exponents = range(-8, 4)
    codes = every_code(affine_fmt, 2 * len(exponents))
    scales = np.array([s * 2.0**e for e in exponents for s in (1, -1)])
    biases = -scales * np.resize(
        [0, 1, 2**affine_fmt.bits - 1, 2 ** (affine_fmt.bits - 1)], scales.shape
    )
    groups = codes.shape[1] // affine_fmt.group_size
    storage = oracle.NUMPY_DTYPE[dtype]
    w = Weight(
        oracle.pack(codes, affine_fmt.bits),
        *(np.repeat(a[:, None], groups, 1).astype(storage) for a in (scales, biases)),
    )
    for out in (None, mx.float32, mx.float16, mx.bfloat16):
        y = dequantize(affine_fmt, w, dtype=out)
        assert y.dtype == (out or dtype)
        oracle.assert_equal(y, oracle.decode(affine_fmt, w))


def affine_slack(w: Weight, fmt: Any, dtype: mx.Dtype, want: np.ndarray) -> np.ndarray:
    """One rounding of s * q and one of the sum, to the dtype of the scales, and one to `dtype`."""
    product = np.abs(oracle.decode(fmt, Weight(w.words, w.scales, np.zeros_like(w.biases))))
    storage = oracle.ROUNDOFF[oracle.MLX_DTYPE[w.scales.dtype]]
    tiny = float(np.finfo(np.float16).smallest_subnormal)
    return (
        storage * (product + np.abs(want)) * 1.01
        + oracle.ROUNDOFF[dtype] * np.abs(want) * 1.01
        + tiny
    )


@given(data=st.data())
def test_random_words(fmt, dtype, data):
    batch = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    N, K = data.draw(strategies.columns), data.draw(strategies.depths(fmt.group_size))
    layout = data.draw(st.sampled_from(strategies.LAYOUTS))
    rng = np.random.default_rng(data.draw(strategies.seeds))
    w = strategies.random_weight(rng, fmt, N, K, dtype, batch)
    y = dequantize(fmt, w, layout, dtype=dtype)
    assert y.shape == (*batch, N, K) and y.dtype == dtype
    want = oracle.decode(fmt, w)
    if fmt.mode == "affine":
        error = np.abs(oracle.f64(y) - want)
        assert (error <= affine_slack(w, fmt, dtype, want)).all(), error.max()
    else:
        oracle.assert_equal(y, want)


def test_result_dtype(fmt, dtype):
    """Without `dtype`: that of the scales for affine, bfloat16 for scale bytes."""
    w = strategies.random_weight(np.random.default_rng(0), fmt, 3, fmt.group_size, dtype)
    assert dequantize(fmt, w).dtype == (dtype if fmt.mode == "affine" else mx.bfloat16)


@pytest.mark.parametrize("scale", [2688.0, 0.5, 1e-3, 3e4])
def test_global_scale(nv_fmt, dtype, scale):
    """The factor is global_scale / 2688; `dtype` is honoured with it too."""
    rng = np.random.default_rng(3)
    w = strategies.random_weight(rng, nv_fmt, 7, 96, dtype)
    y = dequantize(nv_fmt, w, dtype=dtype, global_scale=mx.array(scale))
    want = oracle.decode(nv_fmt, w, np.float32(scale))
    smallest = 2.0**-24 if dtype == mx.float16 else 0
    assert y.dtype == dtype
    error = np.abs(oracle.f64(y) - want)
    assert (error <= (oracle.ROUNDOFF[dtype] + 3 * 2.0**-24) * np.abs(want) + smallest).all()
    if scale == 2688.0:
        oracle.assert_equal(y, want)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_non_finite_scale_stays_in_its_group(affine_fmt, dtype, poison):
    """A NaN or infinite scale or bias spoils its own group, all of it, and no other.

    Which of NaN and infinity comes out is not promised: s * q + b may be taken apart.
    """
    w = strategies.random_weight(
        np.random.default_rng(4), affine_fmt, 4, 3 * affine_fmt.group_size, dtype
    )
    w.scales[1, 1] = poison
    w.biases[2, 0] = poison
    got = oracle.f64(dequantize(affine_fmt, w, dtype=mx.float32))
    hit = np.zeros((4, 3), bool)
    hit[1, 1] = hit[2, 0] = True
    hit = np.repeat(hit, affine_fmt.group_size, -1)
    assert not np.isfinite(got[hit]).any()
    assert np.isfinite(got[~hit]).all()


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (0, 2, 2)])
def test_empty(fmt, shape):
    K = shape[-1] * fmt.group_size
    words = mx.zeros((*shape[:-1], K * fmt.bits // 32), mx.uint32)
    scales = mx.zeros(shape, mx.float32 if fmt.has_biases else mx.uint8)
    y = ops.dequantize(
        words, scales, scales if fmt.has_biases else None, **strategies.format_keywords(fmt)
    )
    mx.eval(y)
    assert y.shape == (*shape[:-1], K)
