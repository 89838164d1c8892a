"""Assertions shared by the tests of the matrix products: one problem in, one verdict out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import strategies
from mlx_lowbit import ops
from oracle import Weight
from strategies import Problem


def run(problem: Problem, **more: Any) -> mx.array:
    """The product of `problem` through `quantized_matmul`."""
    x, words, scales, biases = problem.arrays()
    return ops.quantized_matmul(x, words, scales, biases, **problem.keywords(), **more)


def check_random(problem: Problem) -> None:
    """Random bits and layouts: within the derived tolerance of the float64 product."""
    oracle.assert_close(run(problem), problem.product(), problem.K, dtype=problem.dtype)


def decodes_first(x: mx.array, weight: tuple[mx.array | None, ...], **keywords: Any) -> bool:
    """Whether the plan decodes weights to x's dtype and leaves the product to MLX's own matmul.

    Some plans of a GPU do, none of the CPU: transpose=False, and rows of codes that its fused
    kernels cannot read. cuBLAS may then round a sum to 16 bits before the bias, or another part
    of K, is added to it.
    """
    return oracle.on_gpu() and "then MLX's matmul" in ops.explain(x, *weight, **keywords)


def assert_exact(y: mx.array, product: oracle.Product, K: int, cublas: bool) -> None:
    """`product`, exact in float32, after one rounding; or as the contract bounds it, of cuBLAS."""
    if cublas:
        oracle.assert_close(y, product, K)
    else:
        oracle.assert_equal(y, product.value)


def remainders(rows: Iterator[int] | range, group_size: int) -> Iterator[tuple[int, int, int]]:
    """(M, N, K) with every M of `rows`, every N from 1 to 70 and every group count from 1 to 9."""
    rows = list(rows)
    for i in range(max(70, len(rows))):
        yield rows[i * 5 % len(rows)], 1 + i * 11 % 70, group_size * (1 + i * 4 % 9)


def check_exact(fmt: Any, dtype: mx.Dtype, M: int, N: int, K: int, seed: int = 0) -> None:
    """A product that float32 can hold exactly, with a bias: equality after one output rounding."""
    rng = np.random.default_rng([seed, M, N, K])
    x = strategies.exact_activations(rng, (M, K), dtype)
    w = strategies.exact_weight(rng, fmt, N, K, dtype)
    bias = rng.integers(-64, 65, N).astype(np.float32).astype(oracle.NUMPY_DTYPE[dtype])
    global_scale = 2688.0 * 2.0 ** rng.integers(-3, 4) if fmt.mode == "nvfp4" and N % 2 else None
    arrays, keywords = strategies.weight_arrays(w), strategies.format_keywords(fmt)
    y = ops.quantized_matmul(
        oracle.to_mlx(x),
        *arrays,
        **keywords,
        **strategies.optional(bias=bias, global_scale=global_scale),
    )
    assert y.shape == (M, N) and y.dtype == dtype
    product = oracle.quantized_matmul(fmt, x, w, bias=bias, global_scale=global_scale)
    try:
        assert_exact(y, product, K, decodes_first(oracle.to_mlx(x), arrays, **keywords))
    except AssertionError as error:
        raise AssertionError(f"{fmt.name} {dtype} M={M} N={N} K={K}") from error


def rows_of(w: Weight, rows: Any) -> Weight:
    """The chosen rows of a weight [N, ...]."""
    return Weight(*(None if a is None else a[rows] for a in w))


def permute_groups(
    fmt: Any, x: np.ndarray, w: Weight, order: np.ndarray
) -> tuple[np.ndarray, Weight]:
    """Both operands with their groups along K in another order; the product stays the same."""

    def permuted(a: np.ndarray) -> np.ndarray:
        return a.reshape(*a.shape[:-1], len(order), -1)[..., order, :].reshape(a.shape)

    return permuted(x), Weight(*(None if a is None else permuted(a) for a in w))


def untransposed(
    fmt: Any, x: np.ndarray, w: Weight, layout: str = "contiguous", **more: Any
) -> mx.array:
    """x [M, K] @ w [K, N], the stored rows of w being K."""
    return ops.quantized_matmul(
        strategies.lay_out(x, layout),
        *strategies.weight_arrays(w, layout),
        transpose=False,
        **strategies.format_keywords(fmt),
        **more,
    )


def check_exact_untransposed(fmt: Any, dtype: mx.Dtype, M: int, N: int, K: int) -> None:
    """`check_exact` for transpose=False."""
    rng = np.random.default_rng([M, N, K])
    x = strategies.exact_activations(rng, (M, K), dtype)
    w = strategies.exact_weight(rng, fmt, K, N, dtype)
    bias = rng.integers(-64, 65, N).astype(np.float32).astype(oracle.NUMPY_DTYPE[dtype])
    y = untransposed(fmt, x, w, bias=oracle.to_mlx(bias))
    assert y.shape == (M, N) and y.dtype == dtype
    keywords = dict(transpose=False, **strategies.format_keywords(fmt))
    product = oracle.quantized_matmul(fmt, x, w, bias=bias, transpose=False)
    cublas = decodes_first(oracle.to_mlx(x), strategies.weight_arrays(w), **keywords)
    assert_exact(y, product, K, cublas)


def check_untransposed(
    fmt: Any, dtype: mx.Dtype, M: int, N: int, K: int, layout: str, seed: int
) -> None:
    """`check_random` for transpose=False."""
    rng = np.random.default_rng(seed)
    x = strategies.activations(rng, (M, K), dtype)
    w = strategies.random_weight(rng, fmt, K, N, dtype)
    product = oracle.quantized_matmul(fmt, x, w, transpose=False)
    oracle.assert_close(untransposed(fmt, x, w, layout), product, K, dtype=dtype)
