"""linear: dense x @ w.T + bias, accumulated in float32: through the same panels as weights that
are decoded on the CPU, MLX's own matmul on a GPU.
"""

from __future__ import annotations

import checks
import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit import ops


def exact(M: int, N: int, K: int, dtype: mx.Dtype) -> None:
    """Integers whose sums float32 holds exactly: equality after one rounding.

    Of 16-bit results on a GPU, where cuBLAS may round more than once, the contract's bound.
    """
    rng = np.random.default_rng([M, N, K])
    storage = oracle.NUMPY_DTYPE[dtype]
    x = strategies.exact_activations(rng, (M, K), dtype)
    w = rng.integers(-255, 256, (N, K)).astype(np.float32).astype(storage)
    bias = rng.integers(-64, 65, N).astype(np.float32).astype(storage)
    y = ops.linear(oracle.to_mlx(x), oracle.to_mlx(w), bias=oracle.to_mlx(bias))
    assert y.shape == (M, N) and y.dtype == dtype
    cublas = oracle.on_gpu() and dtype != mx.float32
    checks.assert_exact(y, oracle.matmul(x, w, bias=bias), K, cublas)


@given(data=st.data())
def test_random_values(dtype, data):
    rng = np.random.default_rng(data.draw(strategies.seeds))
    M = data.draw(st.one_of(strategies.few_rows, strategies.many_rows))
    N, K = (
        data.draw(strategies.columns),
        data.draw(st.one_of(st.integers(1, 70), st.integers(71, 1500))),
    )
    x, w = (strategies.activations(rng, shape, dtype) for shape in ((M, K), (N, K)))
    bias = strategies.activations(rng, (N,), dtype) if data.draw(st.booleans()) else None
    layouts = (
        data.draw(st.sampled_from(strategies.LAYOUTS)),
        data.draw(st.sampled_from(strategies.LAYOUTS)),
    )
    y = ops.linear(
        strategies.lay_out(x, layouts[0]),
        strategies.lay_out(w, layouts[1]),
        **strategies.optional(bias=bias),
    )
    oracle.assert_close(y, oracle.matmul(x, w, bias=bias), K, dtype=dtype)


def test_every_remainder_exactly(dtype):
    """K is any number here: no group rounds it to a multiple of anything."""
    for i in range(1, 141):
        exact(1 + i * 5 % 70, 1 + i * 11 % 70, i, dtype)


@pytest.mark.parametrize("M", range(1, 10))
def test_few_rows_exactly(M, dtype):
    for N, K in [(1, 1), (2, 3), (33, 31), (64, 64), (65, 127), (257, 130), (3, 1023)]:
        exact(M, N, K, dtype)


def test_blocks_exactly(dtype):
    """Beyond one block of M and one of N; the longest sums that stay exact."""
    for M, N, K in [(513, 3, 17), (1030, 2, 5), (9, 1100, 33), (130, 131, 1024)]:
        exact(M, N, K, dtype)


def test_long_sums(dtype, rng):
    for M in (1, 6, 20):
        x, w = (strategies.activations(rng, shape, dtype) for shape in ((M, 16385), (7, 16385)))
        y = ops.linear(oracle.to_mlx(x), oracle.to_mlx(w))
        oracle.assert_close(y, oracle.matmul(x, w), 16385, dtype=dtype)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 5), (2, 1, 3, 5)])
def test_leading_dimensions(shape, dtype, rng):
    x = strategies.exact_activations(rng, shape, dtype)
    w = strategies.exact_activations(rng, (7, 5), dtype)
    y = ops.linear(oracle.to_mlx(x), oracle.to_mlx(w))
    assert y.shape == (*shape[:-1], 7)
    oracle.assert_equal(y, oracle.f64(x) @ oracle.f64(w).T)


@pytest.mark.parametrize("M, N, K", [(0, 4, 8), (3, 0, 8), (3, 4, 0), (0, 0, 0)])
def test_empty(M, N, K, dtype):
    bias = mx.arange(N).astype(dtype)
    y = ops.linear(mx.ones((M, K), dtype), mx.ones((N, K), dtype), bias=bias)
    want = np.broadcast_to(np.arange(N, dtype=np.float64), (M, N))
    assert y.shape == (M, N)
    np.testing.assert_array_equal(oracle.f64(y), want)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("M", [1, 4, 30])
def test_bad_activation_stays_in_its_row(dtype, value, M, rng):
    x = strategies.exact_activations(rng, (M, 45), dtype)
    w = strategies.exact_activations(rng, (21, 45), dtype)
    x[M // 2, 44] = value
    with np.errstate(invalid="ignore"):
        want = (oracle.f64(x)[:, None] * oracle.f64(w)[None]).sum(-1)
    np.testing.assert_array_equal(oracle.f64(ops.linear(oracle.to_mlx(x), oracle.to_mlx(w))), want)


@pytest.mark.parametrize(
    "x_dtype, w_dtype",
    [(mx.bfloat16, mx.float32), (mx.float32, mx.bfloat16), (mx.float16, mx.bfloat16)],
)
def test_mixed_dtypes_promote_as_mlx(x_dtype, w_dtype, rng):
    x = strategies.exact_activations(rng, (3, 40), x_dtype)
    w = strategies.exact_activations(rng, (6, 40), w_dtype)
    y = ops.linear(oracle.to_mlx(x), oracle.to_mlx(w))
    assert y.dtype == (oracle.to_mlx(x) @ oracle.to_mlx(w).T).dtype
    oracle.assert_equal(y, oracle.f64(x) @ oracle.f64(w).T)
