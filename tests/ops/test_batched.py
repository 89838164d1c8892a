"""Ranks, broadcast batches, empty sizes, promotion: the shapes of MLX's own op."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit import formats, ops
from oracle import Weight

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def product(
    fmt: Any, x: np.ndarray, w: Weight, layout: str = "contiguous", **more: Any
) -> mx.array:
    return ops.quantized_matmul(
        strategies.lay_out(x, layout),
        *strategies.weight_arrays(w, layout),
        **strategies.format_keywords(fmt),
        **more,
    )


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (1, 2, 1, 3), (2, 1, 5, 2)])
def test_ranks_of_x(fmt, dtype, shape, rng):
    """x [..., K] against a 2-D w, from one dimension to five."""
    K = 2 * fmt.group_size
    x = strategies.exact_activations(rng, (*shape, K), dtype)
    w = strategies.exact_weight(rng, fmt, 13, K, dtype)
    y = product(fmt, x, w)
    assert y.shape == (*shape, 13)
    oracle.assert_equal(y, oracle.f64(x) @ oracle.decode(fmt, w).T)


@given(data=st.data())
def test_batched_weights(fmt, data):
    """x [..., M, K] with w [..., N, K]: leading dimensions broadcast against each other."""
    dtype = data.draw(st.sampled_from(DTYPES))
    rng = np.random.default_rng(data.draw(strategies.seeds))
    x_batch, w_batch = data.draw(
        st.sampled_from(
            [
                ((3,), (3,)),
                ((1,), (3,)),
                ((3,), (1,)),
                ((2, 3), (2, 3)),
                ((2, 1), (1, 3)),
                ((2, 3), (3,)),
                ((3,), (2, 3)),
            ]
        )
    )
    M, N = data.draw(st.sampled_from([1, 2, 5, 33])), data.draw(st.integers(1, 40))
    K, transpose = 2 * fmt.group_size, data.draw(st.booleans())
    x = strategies.exact_activations(rng, (*x_batch, M, K if transpose else N), dtype)
    w = strategies.exact_weight(rng, fmt, N, K, dtype, w_batch)
    layout = data.draw(st.sampled_from(strategies.LAYOUTS))
    y = product(fmt, x, w, layout, transpose=transpose)
    values = oracle.decode(fmt, w)
    want = oracle.f64(x) @ (np.swapaxes(values, -1, -2) if transpose else values)
    assert y.shape == want.shape
    oracle.assert_equal(y, want)


def test_bias_of_batched_weights_is_rounded_with_the_sum(fmt, dtype, rng):
    """One rounding, of the sum and the bias together, also where w has leading dimensions."""
    K = 4 * fmt.group_size
    x = strategies.exact_activations(rng, (3, 5, K), dtype)
    w = strategies.exact_weight(rng, fmt, 21, K, dtype, (3,))
    bias = rng.integers(-64, 65, 21).astype(np.float32).astype(oracle.NUMPY_DTYPE[dtype]) / 4
    want = oracle.f64(x) @ np.swapaxes(oracle.decode(fmt, w), -1, -2) + oracle.f64(bias)
    oracle.assert_equal(product(fmt, x, w, bias=oracle.to_mlx(bias)), want)


@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_bias_of_another_dtype(fmt, dtype, bias_dtype, rng):
    """The bias enters with its own bits and does not change the dtype of the result."""
    K = 2 * fmt.group_size
    x = strategies.exact_activations(rng, (3, K), dtype)
    w = strategies.exact_weight(rng, fmt, 21, K, dtype)
    bias = ((1 + np.arange(21)) / 64 * 2.0 ** (np.arange(21) % 9)).astype(np.float32)
    bias = bias.astype(oracle.NUMPY_DTYPE[bias_dtype])
    y = product(fmt, x, w, bias=oracle.to_mlx(bias))
    assert y.dtype == dtype
    oracle.assert_equal(y, oracle.f64(x) @ oracle.decode(fmt, w).T + oracle.f64(bias))


def test_stride_zero_batches(fmt, rng):
    """Broadcast views of x and of w: the same memory for every batch entry."""
    K = 2 * fmt.group_size
    x = strategies.exact_activations(rng, (1, 4, K), mx.float32)
    w = strategies.exact_weight(rng, fmt, 9, K, mx.float32, (1,))
    arrays = [
        None if a is None else mx.broadcast_to(a, (5, *a.shape[1:]))
        for a in strategies.weight_arrays(w)
    ]
    y = ops.quantized_matmul(
        mx.broadcast_to(oracle.to_mlx(x), (5, 4, K)), *arrays, **strategies.format_keywords(fmt)
    )
    want = oracle.f64(x) @ np.swapaxes(oracle.decode(fmt, w), -1, -2)
    oracle.assert_equal(y, np.broadcast_to(want, (5, 4, 9)))


def test_broadcast_row_of_x(fmt, dtype, rng):
    """One row repeated M times by a stride of zero."""
    K = 3 * fmt.group_size
    x = strategies.exact_activations(rng, (1, K), dtype)
    w = strategies.exact_weight(rng, fmt, 11, K, dtype)
    for M in (2, 9, 70):
        y = ops.quantized_matmul(
            mx.broadcast_to(oracle.to_mlx(x), (M, K)),
            *strategies.weight_arrays(w),
            **strategies.format_keywords(fmt),
        )
        oracle.assert_equal(y, np.repeat(oracle.f64(x) @ oracle.decode(fmt, w).T, M, 0))


@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_promotion_of_affine(affine_fmt, dtype, scale_dtype, rng):
    """The result has MLX's promotion of x, scales and biases; each is used with its own bits."""
    K = 2 * affine_fmt.group_size
    x = strategies.exact_activations(rng, (4, K), dtype)
    w = strategies.exact_weight(rng, affine_fmt, 10, K, scale_dtype)
    mixed = w._replace(biases=w.biases.astype(np.float32))
    for weight in (w, mixed):
        arrays = strategies.weight_arrays(weight)
        keywords = strategies.format_keywords(affine_fmt)
        y = ops.quantized_matmul(oracle.to_mlx(x), *arrays, **keywords)
        assert y.dtype == mx.quantized_matmul(oracle.to_mlx(x), *arrays, **keywords).dtype
        oracle.assert_equal(y, oracle.f64(x) @ oracle.decode(affine_fmt, weight).T)


def test_result_has_the_dtype_of_x(scaled_fmt, dtype, rng):
    w = strategies.exact_weight(rng, scaled_fmt, 10, 64, dtype)
    assert product(scaled_fmt, strategies.exact_activations(rng, (4, 64), dtype), w).dtype == dtype


@pytest.mark.parametrize("M, N, groups", [(0, 5, 2), (3, 0, 2), (3, 5, 0), (0, 0, 0), (0, 5, 0)])
def test_empty(fmt, dtype, M, N, groups):
    """M or N of zero give empties; K of zero gives zeros, or the bias; in batches too."""
    for batch in ((), (2,), (0,)):
        check_empty(fmt, dtype, batch, M, N, groups)


def check_empty(
    fmt: Any, dtype: mx.Dtype, batch: tuple[int, ...], M: int, N: int, groups: int
) -> None:
    K = groups * fmt.group_size
    storage = dtype if fmt.has_biases else mx.uint8
    words, scales = mx.zeros((N, K * fmt.bits // 32), mx.uint32), mx.zeros((N, groups), storage)
    for bias in (None, mx.arange(N).astype(dtype)):
        y = ops.quantized_matmul(
            mx.ones((*batch, M, K), dtype),
            words,
            scales,
            scales if fmt.has_biases else None,
            bias=bias,
            **strategies.format_keywords(fmt),
        )
        assert y.shape == (*batch, M, N) and y.dtype == dtype
        want = np.zeros(N) if bias is None else np.arange(N, dtype=np.float64)
        np.testing.assert_array_equal(oracle.f64(y), np.broadcast_to(want, y.shape))


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_bias_shapes(fmt, shape, rng):
    """bias [N] is added to every row; nothing of rank two is taken for it."""
    x = strategies.exact_activations(rng, (2, 3, fmt.group_size), mx.float32)
    w = strategies.exact_weight(rng, fmt, 4, fmt.group_size, mx.float32)
    bias = np.arange(4, dtype=np.float32).reshape(shape)
    if shape == (4,):
        oracle.assert_equal(
            product(fmt, x, w, bias=mx.array(bias)), oracle.f64(x) @ oracle.decode(fmt, w).T + bias
        )
    else:
        with pytest.raises(ValueError, match=r"\bbias\b.*\(4,?\).*\(1, ?4\)"):
            product(fmt, x, w, bias=mx.array(bias))


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_default_arguments(mode):
    """bits and group_size of None mean MLX's defaults of the mode."""
    w = mx.random.normal((6, 128))
    q = ops.quantize(w, mode=mode)
    theirs = mx.quantize(w, mode=mode)
    assert all(
        mx.array_equal(a, b).item() for a, b in zip(q, theirs, strict=False) if a is not None
    )
    explicit = strategies.format_keywords(formats.get(mode))
    y = ops.quantized_matmul(w, *q, mode=mode)
    assert mx.array_equal(y, ops.quantized_matmul(w, *q, **explicit)).item()
    assert mx.array_equal(ops.dequantize(*q, mode=mode), ops.dequantize(*q, **explicit)).item()
