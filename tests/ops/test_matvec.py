"""quantized_matmul with few rows: M from 1 to 8, the decode step."""

from __future__ import annotations

import checks
import strategies
from hypothesis import given
from hypothesis import strategies as st


@given(data=st.data())
def test_random_bits(fmt, dtype, data):
    checks.check_random(data.draw(strategies.problems(fmt, dtype, strategies.few_rows)))


def test_every_remainder_exactly(fmt, dtype):
    for M, N, K in checks.remainders(range(1, 9), fmt.group_size):
        checks.check_exact(fmt, dtype, M, N, K)


def test_long_rows_exactly(fmt, dtype):
    """K of 1024 at most keeps the sums exact; the count of groups is odd, or a power of two."""
    for M, N, groups in [
        (1, 5, 1024 // fmt.group_size),
        (2, 33, 1024 // fmt.group_size - 1),
        (3, 2, 7),
    ]:
        checks.check_exact(fmt, dtype, M, N, groups * fmt.group_size)


def test_many_stored_rows(fmt, dtype):
    """More rows of w than one thread takes at a time."""
    for M, N in [(1, 1057), (3, 530), (8, 300)]:
        checks.check_random(
            strategies.Problem(fmt, dtype, M, N, 3 * fmt.group_size, seed=N, with_bias=True)
        )


def test_long_sums(judged_fmt, dtype):
    """Long K: an accumulator narrower than float32 fails here by orders of magnitude."""
    for M, K in [(1, 8192 + judged_fmt.group_size), (5, 4096)]:
        checks.check_random(strategies.Problem(judged_fmt, dtype, M, 24, K, seed=K))
