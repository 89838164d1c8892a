"""quantized_matmul with many rows: decoded panels, their edges, and blocks of M and K."""

from __future__ import annotations

import checks
import mlx.core as mx
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st


@given(data=st.data())
def test_random_bits(fmt, dtype, data):
    checks.check_random(data.draw(strategies.problems(fmt, dtype, strategies.many_rows)))


def test_every_remainder_exactly(fmt, dtype):
    for M, N, K in checks.remainders(range(1, 71), fmt.group_size):
        checks.check_exact(fmt, dtype, M, N, K)


@pytest.mark.parametrize("M", [127, 128, 129, 130])
def test_around_two_tiles_of_rows(fmt, M, dtype):
    checks.check_exact(fmt, dtype, M, 67, 3 * fmt.group_size)


def test_more_rows_than_a_block(fmt, dtype):
    """x is packed some hundreds of rows at a time: M beyond one and two such blocks."""
    for M in (513, 1030):
        checks.check_exact(fmt, dtype, M, 3, fmt.group_size)


def test_longer_than_a_panel(judged_fmt, dtype):
    """K beyond the longest panel of any target, so that sums continue in a second and third one."""
    for M, N, K in [
        (9, 70, 8192 + judged_fmt.group_size),
        (17, 33, 16384 + 2 * judged_fmt.group_size),
    ]:
        checks.check_random(strategies.Problem(judged_fmt, dtype, M, N, K, seed=K, with_bias=True))


def test_long_sums(judged_fmt, dtype):
    """Long K: an accumulator narrower than float32 fails here by orders of magnitude."""
    checks.check_random(strategies.Problem(judged_fmt, dtype, 20, 70, 4096, seed=1))


def test_more_tiles_than_the_product_before(judged_fmt):
    """On CUDA the launch of each is an update of a graph with the launch of the one before, to a
    grid of another size, and rows are longer than what is copied ahead."""
    for M in (33, 64, 65, 129):
        checks.check_random(strategies.Problem(judged_fmt, mx.bfloat16, M, 1408, 4096, seed=M))


@pytest.mark.parametrize("M", [1, 4, 9, 40])
def test_untransposed_exactly(fmt, dtype, M):
    """transpose=False: x [M, K] @ w [K, N], groups along N."""
    for K, groups in [(1, 1), (3, 2), (8, 1), (33, 3), (64, 2), (70, 1)]:
        checks.check_exact_untransposed(fmt, dtype, M, groups * fmt.group_size, K)


@given(data=st.data())
def test_untransposed_random_bits(fmt, dtype, data):
    M, K = data.draw(st.integers(1, 40)), data.draw(strategies.columns)
    N = data.draw(strategies.depths(fmt.group_size))
    layout, seed = data.draw(st.sampled_from(strategies.LAYOUTS)), data.draw(strategies.seeds)
    checks.check_untransposed(fmt, dtype, M, N, K, layout, seed)
