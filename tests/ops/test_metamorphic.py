"""Relations between products that hold whatever the reference says."""

from __future__ import annotations

from typing import Any

import checks
import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import ops
from oracle import Weight
from strategies import Problem

ROWS = (1, 3, 8, 21, 66)


def product(
    fmt: Any, x: np.ndarray, w: Weight, layout: str = "contiguous", **more: Any
) -> np.ndarray:
    y = ops.quantized_matmul(
        strategies.lay_out(x, layout),
        *strategies.weight_arrays(w, layout),
        **strategies.format_keywords(fmt),
        **more,
    )
    return oracle.to_numpy(y)


def assert_same_bits(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_array_equal(oracle.bits_of(a), oracle.bits_of(b))


@pytest.mark.parametrize("M", ROWS)
def test_strided_equals_contiguous(fmt, dtype, M):
    p = Problem(fmt, dtype, M, 37, 3 * fmt.group_size, seed=M)
    plain = product(fmt, p.x, p.w)
    for layout in strategies.LAYOUTS:
        assert_same_bits(product(fmt, p.x, p.w, layout), plain)


@pytest.mark.parametrize("M", ROWS)
def test_permuted_rows_permute_the_result(fmt, M, rng):
    """Rows of x and rows of w: a value depends on its own row and column alone."""
    p = Problem(fmt, mx.bfloat16, M, 53, 2 * fmt.group_size, seed=M)
    rows, columns = rng.permutation(M), rng.permutation(53)
    plain = product(fmt, p.x, p.w)
    moved = product(fmt, p.x[rows], checks.rows_of(p.w, columns))
    oracle.assert_close(
        oracle.to_mlx(moved),
        p.product()._replace(**{k: v[rows][:, columns] for k, v in p.product()._asdict().items()}),
        p.K,
    )
    assert np.allclose(
        oracle.f64(moved), oracle.f64(plain)[rows][:, columns], rtol=2**-6, atol=1e-2
    )


@pytest.mark.parametrize("M", ROWS)
def test_permuted_groups_keep_the_product(fmt, dtype, M, rng):
    """Whole groups may be summed in any order: exact where the sums are exact."""
    groups = 5
    x = strategies.exact_activations(rng, (M, groups * fmt.group_size), dtype)
    w = strategies.exact_weight(rng, fmt, 19, groups * fmt.group_size, dtype)
    assert_same_bits(
        product(fmt, x, w), product(fmt, *checks.permute_groups(fmt, x, w, rng.permutation(groups)))
    )


@pytest.mark.parametrize("power", [-3, 2])
def test_powers_of_two_factor_out(fmt, dtype, power, rng):
    """Scales (and biases) times 2^k give the result times 2^k, to the bit."""
    for M in ROWS:
        x = strategies.exact_activations(rng, (M, 2 * fmt.group_size), dtype) / 4  # far from 65504
        w = strategies.exact_weight(rng, fmt, 17, 2 * fmt.group_size, dtype)
        if fmt.mode == "affine":
            factor = w.scales.dtype.type(2.0**power)
            scaled = w._replace(scales=w.scales * factor, biases=w.biases * factor)
        else:  # one binade of e8m0 is a step of 1, of e4m3 a step of 8
            step = power * (8 if fmt.mode == "nvfp4" else 1)
            scaled = w._replace(scales=(w.scales.astype(int) + step).astype(np.uint8))
        got, want = oracle.f64(product(fmt, x, scaled)), oracle.f64(product(fmt, x, w))
        np.testing.assert_array_equal(got, want * 2.0**power)


def test_zero_rows_give_zero(fmt, dtype):
    """A zero row of x gives a row of zeros, or the bias; its neighbours do not notice."""
    for M in ROWS:
        p = Problem(fmt, dtype, M, 29, 2 * fmt.group_size, seed=M, with_bias=True)
        plain = product(fmt, p.x, p.w)
        p.x[M // 2] = 0
        zeroed = product(fmt, p.x, p.w)
        assert not oracle.f64(zeroed[M // 2]).any()
        others = np.arange(M) != M // 2
        assert_same_bits(zeroed[others], plain[others])
        with_bias = product(fmt, p.x, p.w, bias=oracle.to_mlx(p.bias))
        np.testing.assert_array_equal(oracle.f64(with_bias[M // 2]), oracle.f64(p.bias))


def test_row_of_a_batch_equals_that_row_alone(fmt, dtype):
    """Whatever kernel M chooses, a row is within tolerance of the same row at M = 1."""
    p = Problem(fmt, dtype, 66, 41, 3 * fmt.group_size, seed=7)
    whole = p.product()
    for M in ROWS:
        part = oracle.Product(*(a[:M] for a in whole))
        oracle.assert_close(oracle.to_mlx(product(fmt, p.x[:M], p.w)), part, p.K)
    for row in (0, 31, 65):
        part = oracle.Product(*(a[row : row + 1] for a in whole))
        oracle.assert_close(oracle.to_mlx(product(fmt, p.x[row : row + 1], p.w)), part, p.K)


def test_columns_do_not_depend_on_how_many_there_are(fmt, dtype, rng):
    """w[:n] gives the first n columns, exactly where the sums are exact."""
    x = strategies.exact_activations(rng, (5, 2 * fmt.group_size), dtype)
    w = strategies.exact_weight(rng, fmt, 70, 2 * fmt.group_size, dtype)
    whole = product(fmt, x, w)
    for n in (1, 2, 7, 16, 31, 33, 64, 69):
        assert_same_bits(product(fmt, x, checks.rows_of(w, slice(0, n))), whole[:, :n])


def test_one_group_at_a_time_adds_up(fmt, rng):
    """One-hot groups: each group uses its own scale, bias and codes, and only those."""
    g, groups = fmt.group_size, 6
    w = strategies.exact_weight(rng, fmt, 23, groups * g, mx.float32)
    x = strategies.exact_activations(rng, (groups, groups * g), mx.float32)
    x *= np.repeat(np.eye(groups, dtype=np.float32), g, 1)
    got = product(fmt, x, w)
    values = oracle.decode(fmt, w)
    for i in range(groups):
        part = slice(i * g, (i + 1) * g)
        np.testing.assert_array_equal(oracle.f64(got[i]), values[:, part] @ oracle.f64(x[i, part]))


def test_same_call_same_bits(judged_fmt, dtype):
    """The split over threads does not depend on timing."""
    for M in (1, 5, 40):
        p = Problem(judged_fmt, dtype, M, 517, 1024, seed=M)
        first = product(judged_fmt, p.x, p.w)
        for _ in range(4):
            assert_same_bits(product(judged_fmt, p.x, p.w), first)


def test_backends_agree(judged_fmt, backend):
    p = Problem(judged_fmt, mx.float32, 4, 33, 256, seed=5, with_bias=True)
    checks.check_random(p)
    assert ops.get_backend() == backend
