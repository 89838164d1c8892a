"""Ours against MLX's own ops in float32, where MLX's CPU code accumulates in float32."""

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
from strategies import Problem

# Both sides within 1e-6 of the truth at K <= 2048, MLX's naive sums at a few times that.
AGREEMENT = 1e-5
# On a GPU MLX multiplies float32 with the tensor cores where it can: both factors are tf32, of
# 11 significant bits.
TF32 = 2.0**-10


def assert_agree(ours: mx.array, theirs: mx.array) -> None:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    a, b = oracle.f64(ours), oracle.f64(theirs)
    assert np.linalg.norm(a - b) <= AGREEMENT * max(np.linalg.norm(b), 1e-30)


@given(data=st.data())
def test_quantized_matmul(fmt, data):
    """Both near the same float64 product: ours within its contract, MLX's within its arithmetic.

    MLX gets copies in row order: its GPU kernels refuse other layouts.
    """
    problem = data.draw(strategies.problems(fmt, mx.float32, st.integers(1, 33)))
    problem.global_scale = None
    product = problem.product()
    ours = checks.run(problem)
    oracle.assert_close(ours, product, problem.K, dtype=mx.float32)
    arrays = (None if a is None else mx.contiguous(a) for a in problem.arrays())
    theirs = mx.quantized_matmul(*arrays, **strategies.format_keywords(fmt))
    if problem.bias is not None:
        theirs = theirs + mx.array(problem.bias)
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    size = max(np.linalg.norm(product.rms), np.linalg.norm(product.value))
    bound = (TF32 if oracle.on_gpu() else AGREEMENT) * size
    assert np.linalg.norm(oracle.f64(theirs) - oracle.f64(ours)) <= bound
    assert np.linalg.norm(oracle.f64(theirs) - product.value) <= bound


@pytest.mark.parametrize("M", [1, 7, 20])
def test_untransposed(fmt, M):
    p = Problem(fmt, mx.float32, M, 40, 2 * fmt.group_size, seed=M)
    arrays, keywords = strategies.weight_arrays(p.w), strategies.format_keywords(fmt)
    x = mx.random.normal((M, 40), key=mx.random.key(M))
    assert_agree(
        ops.quantized_matmul(x, *arrays, transpose=False, **keywords),
        mx.quantized_matmul(x, *arrays, transpose=False, **keywords),
    )


def test_shapes_and_dtypes(fmt, dtype):
    """Whatever rank and dtype MLX returns, ours returns."""
    keywords = strategies.format_keywords(fmt)
    K = 2 * fmt.group_size
    w = mx.quantize(mx.random.normal((12, K)).astype(dtype), **keywords)
    for shape in [(K,), (1, K), (3, K), (2, 3, K), (2, 1, 3, K)]:
        x = mx.random.normal(shape).astype(dtype)
        ours, theirs = (
            ops.quantized_matmul(x, *w, **keywords),
            mx.quantized_matmul(x, *w, **keywords),
        )
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype, shape


def test_gather(fmt, rng):
    keywords = strategies.format_keywords(fmt)
    w = mx.quantize(mx.random.normal((4, 24, 2 * fmt.group_size)), **keywords)
    x = mx.random.normal((5, 3, 2 * fmt.group_size))
    lhs, rhs = mx.array(rng.integers(0, 5, (2, 6))), mx.array(rng.integers(0, 4, (2, 6)))
    both = dict(lhs_indices=lhs, rhs_indices=rhs, **keywords)
    assert_agree(ops.gather_qmm(x, *w, **both), mx.gather_qmm(x, *w, **both))
    tokens = x[:, None, :1]
    only = dict(rhs_indices=mx.array(rng.integers(0, 4, (5, 2))), **keywords)
    assert_agree(ops.gather_qmm(tokens, *w, **only), mx.gather_qmm(tokens, *w, **only))


def test_dequantize(fmt, dtype):
    """To the bit for scale bytes in float32 and bfloat16; elsewhere MLX rounds more than once."""
    keywords = strategies.format_keywords(fmt)
    q = mx.quantize(mx.random.normal((16, 4 * fmt.group_size)).astype(dtype), **keywords)
    ours, theirs = ops.dequantize(*q, **keywords), mx.dequantize(*q, **keywords)
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if fmt.has_biases:
        assert mx.allclose(
            ours, theirs, rtol=0, atol=4 * oracle.ROUNDOFF[dtype] * float(theirs.abs().max())
        ).item()
    else:
        assert mx.array_equal(ours, theirs).item()


def test_gradients(affine_fmt):
    """d x, d scales and d biases of MLX's op and of ours."""
    keywords = strategies.format_keywords(affine_fmt)
    words, scales, biases = mx.quantize(
        mx.random.normal((24, 2 * affine_fmt.group_size)), **keywords
    )
    x = mx.random.normal((5, 2 * affine_fmt.group_size))

    def grads(product) -> list[mx.array]:
        loss = lambda x, s, b: product(x, words, s, b, **keywords).square().sum()  # noqa: E731
        return mx.grad(loss, argnums=(0, 1, 2))(x, scales, biases)

    for ours, theirs in zip(grads(ops.quantized_matmul), grads(mx.quantized_matmul), strict=True):
        assert_agree(ours, theirs)
