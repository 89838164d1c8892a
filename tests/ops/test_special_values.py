"""NaN, infinities and the ends of the float16 range."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import ops
from oracle import Weight

ROWS = (1, 2, 7, 20, 65)


def product(fmt: Any, x: np.ndarray, w: Weight, **more: Any) -> np.ndarray:
    y = ops.quantized_matmul(
        oracle.to_mlx(x), *strategies.weight_arrays(w), **strategies.format_keywords(fmt), **more
    )
    return oracle.f64(y)


def reference(fmt: Any, x: np.ndarray, w: Weight) -> np.ndarray:
    """IEEE arithmetic on the decoded weights, product by product."""
    values = oracle.decode(fmt, w)
    with np.errstate(invalid="ignore"):
        return (oracle.f64(x)[:, None, :] * values[None]).sum(-1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("M", ROWS)
def test_one_bad_activation(fmt, dtype, value, M, rng):
    """Only its row is touched; infinity gives +-infinity, or NaN where the weight is zero."""
    N, K = 35, 3 * fmt.group_size
    x = strategies.exact_activations(rng, (M, K), dtype)
    w = strategies.exact_weight(rng, fmt, N, K, dtype)
    clean = product(fmt, x, w)
    row, column = int(rng.integers(M)), int(rng.integers(K))
    x[row, column] = value
    got, want = product(fmt, x, w), reference(fmt, x, w)
    np.testing.assert_array_equal(got[row], want[row])
    others = np.arange(M) != row
    np.testing.assert_array_equal(got[others], clean[others])


@pytest.mark.parametrize("M", ROWS)
def test_opposite_infinities(fmt, dtype, M, rng):
    """Two infinities in one row: NaN where their products have opposite signs."""
    K = 2 * fmt.group_size
    x = strategies.exact_activations(rng, (M, K), dtype)
    w = strategies.exact_weight(rng, fmt, 24, K, dtype)
    x[M - 1, 1], x[M - 1, fmt.group_size + 3] = np.inf, -np.inf
    want = oracle.rounded(reference(fmt, x, w), dtype)
    np.testing.assert_array_equal(product(fmt, x, w), want)


@pytest.mark.parametrize("M", ROWS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_bad_scale_reaches_its_output_column(affine_fmt, dtype, M, value, rng):
    K = 3 * affine_fmt.group_size
    x = strategies.exact_activations(rng, (M, K), dtype)
    w = strategies.exact_weight(rng, affine_fmt, 18, K, dtype)
    w.biases[11, 1] = value
    x[x == 0] = 1
    clean = product(affine_fmt, x, w._replace(biases=np.where(np.isfinite(w.biases), w.biases, 0)))
    got = product(affine_fmt, x, w)
    assert not np.isfinite(got[:, 11]).any()
    np.testing.assert_array_equal(np.delete(got, 11, 1), np.delete(clean, 11, 1))


@pytest.mark.parametrize("M", ROWS)
def test_nan_codes_and_scale_bytes(scaled_fmt, M, rng):
    """e4m3's NaN as an element or as a scale, e8m0's 255: that column is not finite, others are."""
    K = 2 * scaled_fmt.group_size
    x = strategies.exact_activations(rng, (M, K), mx.float32)
    x[x == 0] = 1
    w = strategies.exact_weight(rng, scaled_fmt, 21, K, mx.float32)
    clean = product(scaled_fmt, x, w)
    w.scales[13, 1] = 0x7F if scaled_fmt.mode == "nvfp4" else 255
    hit = [13]
    if scaled_fmt.bits == 8:
        codes = oracle.unpack(w.words, 8)
        codes[4, K - 1] = 0xFF
        w = w._replace(words=oracle.pack(codes, 8))
        hit.append(4)
    got = product(scaled_fmt, x, w)
    assert not np.isfinite(got[:, hit]).any()
    np.testing.assert_array_equal(np.delete(got, hit, 1), np.delete(clean, hit, 1))


@pytest.mark.parametrize("M", ROWS)
def test_float16_sums_may_pass_its_range(fmt, M, rng):
    """Partial sums beyond 65504 come back to a finite result; a result beyond it is infinite."""
    K = 2 * fmt.group_size
    w = strategies.exact_weight(rng, fmt, 9, K, mx.float16)
    w = Weight(
        *(None if a is None else np.concatenate([a[:, : a.shape[1] // 2]] * 2, 1) for a in w)
    )
    x = np.zeros((M, K), np.float16)
    first, second = slice(0, 8), slice(fmt.group_size, fmt.group_size + 8)
    x[:, first], x[:, second] = 32768, -32768
    x[:, 0] = 32768 + 32  # what is left after the two halves cancel
    want = oracle.rounded(reference(fmt, x, w), mx.float16)
    assert np.isfinite(want).all()
    np.testing.assert_array_equal(product(fmt, x, w), want)
    x[:, second] = 32768
    want = oracle.rounded(reference(fmt, x, w), mx.float16)
    assert np.isinf(want).any()
    np.testing.assert_array_equal(product(fmt, x, w), want)


def test_large_float32_values(fmt):
    """Activations of 1e30 and 1e-30 stay what they are."""
    rng = np.random.default_rng(1)
    for factor in (2.0**100, 2.0**-100):
        x = strategies.exact_activations(rng, (3, fmt.group_size), mx.float32) * np.float32(factor)
        w = strategies.exact_weight(rng, fmt, 9, fmt.group_size, mx.float32)
        np.testing.assert_array_equal(product(fmt, x, w), reference(fmt, x, w))
