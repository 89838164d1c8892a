"""16-bit x whose groups mix magnitudes: what a kernel that holds x in fixed point must survive.

A group's elements are then multiples of one step, chosen by its largest magnitude, and sums are
32-bit integers: elements far below the largest, the ends of the exponent range, sums at their
limit. The same holds, and is tested, for every other kernel. NaN and infinity: test_special_values.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import ops
from oracle import Weight

ROWS = (1, 2, 4, 7)
HALVES = pytest.mark.parametrize("half", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])


def product(fmt: Any, x: np.ndarray, w: Weight) -> mx.array:
    return ops.quantized_matmul(
        oracle.to_mlx(x), *strategies.weight_arrays(w), **strategies.format_keywords(fmt)
    )


def integers(rng: np.random.Generator, shape: tuple[int, ...], half: mx.Dtype) -> np.ndarray:
    return strategies.exact_activations(rng, shape, half)


def zeroed(fmt: Any, w: Weight, column: int) -> Weight:
    """The same weight (of `exact_weight`) with zeros in one column: code 1, bias -scale."""
    codes, scales, biases = oracle.unpack(w.words, fmt.bits), w.scales.copy(), w.biases.copy()
    codes[:, column] = 1
    biases[:, column // fmt.group_size] = -scales[:, column // fmt.group_size]
    return Weight(oracle.pack(codes, fmt.bits), scales, biases)


@HALVES
@pytest.mark.parametrize("M", ROWS)
def test_small_elements_beside_a_huge_one(affine_fmt, half, M, rng):
    """The huge one meets zeros, so the result is what 1 to 4 contribute beside 2^14 to 2^18."""
    N, K = 37, 3 * affine_fmt.group_size
    top = 2.0 ** min(22 - affine_fmt.bits, 15 if half == mx.float16 else 18)
    for column in (0, affine_fmt.group_size - 1, K - 1):
        x = integers(rng, (M, K), half)
        w = zeroed(affine_fmt, strategies.exact_weight(rng, affine_fmt, N, K, half), column)
        values = oracle.decode(affine_fmt, w)
        assert values.any() and not values[:, column].any()
        for huge in (top, -top):
            x[:, column] = huge
            want = oracle.f64(x) @ values.T
            oracle.assert_equal(product(affine_fmt, x, w), want)


@HALVES
@pytest.mark.parametrize("M", ROWS)
def test_every_magnitude_in_a_group(affine_fmt, half, M, rng):
    """Magnitudes over 30 binades, zeros and both signs: each element counts to 2^-20 of the largest
    of its group, and the result is rounded once."""
    N, K = 40, 5 * affine_fmt.group_size
    groups = (M, 5, affine_fmt.group_size)
    exponents = rng.uniform(-14, 15, groups) if half == mx.float16 else rng.uniform(-20, 10, groups)
    x = np.exp2(exponents) * rng.choice([-1, 0, 1], groups) / 16
    x = x.reshape(M, K).astype(np.float32).astype(oracle.NUMPY_DTYPE[half])
    w = strategies.random_weight(rng, affine_fmt, N, K, half)
    want = oracle.quantized_matmul(affine_fmt, x, w)
    got = product(affine_fmt, x, w)
    oracle.assert_close(got, want, K)
    largest = np.abs(oracle.f64(x)).reshape(groups).max(-1)
    reach = np.abs(oracle.f64(w.scales)) * (2**affine_fmt.bits - 1)
    steps = 2.0**-20 * affine_fmt.group_size * largest @ reach.T
    rounding = oracle.ROUNDOFF[half] * np.abs(want.value) + oracle.UNDERFLOW[half]
    sums = (K + 8) * 2.0**-24 * want.worst
    assert (np.abs(oracle.f64(got) - want.value) <= steps + rounding + sums).all()


@HALVES
@pytest.mark.parametrize("M", ROWS)
def test_ends_of_the_exponent_range(affine_fmt, half, M, rng):
    """Groups of tiny and of large elements, the scales taking the factor back."""
    N, K, group = 19, 4 * affine_fmt.group_size, affine_fmt.group_size
    for exponent in (-24, -20, 6) if half == mx.float16 else (-124, -100, -60, 60, 97, 110):
        x = oracle.f64(integers(rng, (M, K), half)) * 2.0**exponent
        x = x.astype(np.float32).astype(oracle.NUMPY_DTYPE[half])
        w = strategies.exact_weight(rng, affine_fmt, N, K, half)
        reach = 6 if half == mx.float16 else 110  # of the exponents of scales and biases
        factor = np.float32(2.0 ** np.clip(-exponent, -reach, reach))
        w = Weight(w.words, *((a * factor).astype(a.dtype) for a in (w.scales, w.biases)))
        x[:, group : 2 * group] = 0
        want = oracle.f64(x) @ oracle.decode(affine_fmt, w).T
        assert np.abs(want).max() > 0
        oracle.assert_equal(product(affine_fmt, x, w), want)


@HALVES
@pytest.mark.parametrize("M", ROWS)
def test_largest_sums(affine_fmt, half, M, rng):
    """All codes and all mantissas full, of one sign: the largest integers a sum can meet."""
    N, K = 18, 2 * affine_fmt.group_size
    full = 2 - 2.0 ** (-10 if half == mx.float16 else -7)
    for sign in (-1, 1):
        w = strategies.exact_weight(rng, affine_fmt, N, K, half)
        scales = np.full_like(w.scales, 0.25)
        w = Weight(np.full_like(w.words, 0xFFFFFFFF), scales, np.zeros_like(w.biases))
        x = np.full((M, K), sign * full, oracle.NUMPY_DTYPE[half])
        oracle.assert_close(product(affine_fmt, x, w), oracle.quantized_matmul(affine_fmt, x, w), K)


@HALVES
@pytest.mark.parametrize("M", ROWS)
def test_zero_groups_and_rows(affine_fmt, half, M, rng):
    """Zeros give exactly nothing, also beside other groups and rows."""
    N, K, group = 21, 3 * affine_fmt.group_size, affine_fmt.group_size
    w = strategies.random_weight(rng, affine_fmt, N, K, half)
    x = strategies.activations(rng, (M, K), half)
    x[M - 1] = 0
    assert not oracle.f64(product(affine_fmt, x, w))[M - 1].any()
    x[:, group:] = 0
    alone = Weight(*(a[:, : a.shape[1] // 3] for a in w))
    want = oracle.quantized_matmul(affine_fmt, x[:, :group], alone)
    oracle.assert_close(product(affine_fmt, x, w), want, group)


@HALVES
def test_bad_element_in_a_mixed_group(affine_fmt, half, rng):
    """NaN and infinity beside elements of many magnitudes."""
    N, K = 23, 2 * affine_fmt.group_size
    w = strategies.exact_weight(rng, affine_fmt, N, K, half)
    w.biases[:] = w.scales * -0.5  # no weight is zero, most have the other sign than their bias
    for bad in (np.nan, np.inf, -np.inf):
        x = np.exp2(rng.uniform(-10, 3, (1, K))).astype(oracle.NUMPY_DTYPE[half])
        x[0, 5] = bad
        got = oracle.f64(product(affine_fmt, x, w))[0]
        signs = np.sign(oracle.decode(affine_fmt, w)[:, 5])
        np.testing.assert_array_equal(got, bad * signs)
