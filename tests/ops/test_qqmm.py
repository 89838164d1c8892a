"""qqmm: exactly Q(x) @ Q(w)^T, with Q(x) as mx.quantize defines it for the dtype of x."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from checks import assert_exact, decodes_first
from corpora import corpora
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit import ops
from oracle import Weight


def qqmm(
    fmt: Any, x: np.ndarray, w: Weight, layout: str = "contiguous", **optional: Any
) -> mx.array:
    return ops.qqmm(
        strategies.lay_out(x, layout),
        *strategies.weight_arrays(w, layout)[:2],
        **strategies.format_keywords(fmt),
        **strategies.optional(**optional),
    )


@given(data=st.data())
def test_random_bits(qq_fmt, dtype, data):
    rng = np.random.default_rng(data.draw(strategies.seeds))
    M, N = (
        data.draw(st.one_of(strategies.few_rows, strategies.many_rows)),
        data.draw(strategies.columns),
    )
    K = data.draw(strategies.depths(qq_fmt.group_size))
    x = strategies.activations(rng, (M, K), dtype)
    w = strategies.random_weight(rng, qq_fmt, N, K, dtype)
    more = {}
    if data.draw(st.booleans()):
        more["bias"] = strategies.activations(rng, (N,), dtype)
    if qq_fmt.mode == "nvfp4" and data.draw(st.booleans()):
        more["global_scale_x"] = float(np.abs(x.astype(np.float32)).max()) or 1.0
        more["global_scale_w"] = data.draw(st.floats(1, 5000, width=32))
    y = qqmm(qq_fmt, x, w, data.draw(st.sampled_from(strategies.LAYOUTS)), **more)
    oracle.assert_close(y, oracle.qqmm(qq_fmt, x, w, **more), K, dtype=dtype)


def test_hostile_activations(qq_fmt, dtype, rng):
    """Ties, zeros, one-hot rows, constants: a code that differs from mx.quantize's is seen at once.

    With w the identity, the product is the decoded x itself, so equality is asserted.
    """
    for name, x in corpora(rng, qq_fmt, dtype):
        if name in ("huge", "subnormal"):  # beyond what qqmm's float32 sums and outputs can hold
            continue
        K = x.shape[1]
        w = oracle.encode(qq_fmt, np.eye(K, dtype=np.float32) * 6)
        want = oracle.decode(qq_fmt, oracle.encode(qq_fmt, x)) @ oracle.decode(qq_fmt, w).T
        for rows in (1, 3, len(x)):
            got = oracle.f64(qqmm(qq_fmt, x[:rows], w))
            np.testing.assert_array_equal(got, oracle.rounded(want[:rows], dtype), err_msg=name)


def test_quantizes_x_as_mlx_does(qq_fmt, dtype, rng):
    """The same through MLX: decode(mx.quantize(x)) @ decode(w)^T."""
    x = strategies.activations(rng, (12, 4 * qq_fmt.group_size), dtype)
    w = strategies.random_weight(rng, qq_fmt, 9, x.shape[1], dtype)
    xq = Weight(*map(np.array, mx.quantize(oracle.to_mlx(x), **strategies.format_keywords(qq_fmt))))
    want = oracle.matmul(oracle.decode(qq_fmt, xq), oracle.decode(qq_fmt, w))
    oracle.assert_close(qqmm(qq_fmt, x, w), want, x.shape[1], dtype=dtype)


def test_every_row_count_exactly(qq_fmt, dtype):
    """Codes and scales that quantize without loss: the product of integers comes out exact."""
    for M in [*range(1, 36), 63, 64, 65, 130]:
        rng = np.random.default_rng(M)
        N, K = 1 + M * 7 % 70, qq_fmt.group_size * (1 + M % 6)
        x = exact_rows(rng, qq_fmt, (M, K), dtype)
        w = strategies.exact_weight(rng, qq_fmt, N, K, dtype)
        bias = rng.integers(-64, 65, N).astype(np.float32).astype(oracle.NUMPY_DTYPE[dtype])
        cublas = decodes_first(
            oracle.to_mlx(x),
            strategies.weight_arrays(w),
            quantize_activations=True,
            **strategies.format_keywords(qq_fmt),
        )
        assert_exact(qqmm(qq_fmt, x, w, bias=bias), oracle.qqmm(qq_fmt, x, w, bias=bias), K, cublas)


def exact_rows(
    rng: np.random.Generator, fmt: Any, shape: tuple[int, int], dtype: mx.Dtype
) -> np.ndarray:
    """Rows of {0, +-1, +-2, +-3, +-4, +-6} whose groups all hold a 6: quantized without loss."""
    x = rng.choice([0, 1, 2, 3, 4, 6], shape) * rng.choice([-1, 1], shape)
    x[:, :: fmt.group_size] = 6
    x = x.astype(np.float32).astype(oracle.NUMPY_DTYPE[dtype])
    np.testing.assert_array_equal(oracle.decode(fmt, oracle.encode(fmt, x)), oracle.f64(x))
    return x


def test_rows_are_quantized_alone(qq_fmt, rng):
    """A row with large values changes nothing in its neighbours; a zero row gives zeros."""
    x = strategies.activations(rng, (11, 2 * qq_fmt.group_size), mx.bfloat16)
    w = strategies.random_weight(rng, qq_fmt, 20, x.shape[1], mx.bfloat16)
    plain = oracle.f64(qqmm(qq_fmt, x, w))
    x[4] *= 1024
    x[7] = 0
    got = oracle.f64(qqmm(qq_fmt, x, w))
    others = ~np.isin(np.arange(11), [4, 7])
    np.testing.assert_array_equal(got[others], plain[others])
    assert not got[7].any()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("M", [1, 5, 40])
def test_bad_activations_reach_their_row(qq_fmt, dtype, value, M, rng):
    """Quantizing cannot keep an infinity: its group is NaN, hence the row; no other row."""
    x = exact_rows(rng, qq_fmt, (M, 3 * qq_fmt.group_size), dtype)
    w = strategies.exact_weight(rng, qq_fmt, 14, x.shape[1], dtype)
    clean = oracle.f64(qqmm(qq_fmt, x, w))
    row = M // 2
    x[row, qq_fmt.group_size + 1] = value
    got = oracle.f64(qqmm(qq_fmt, x, w))
    assert not np.isfinite(got[row]).any()
    np.testing.assert_array_equal(np.delete(got, row, 0), np.delete(clean, row, 0))


@pytest.mark.parametrize("shape", [(2, 3), (1, 1), (2, 1, 5)])
def test_leading_dimensions(qq_fmt, dtype, shape, rng):
    K = 2 * qq_fmt.group_size
    x = exact_rows(rng, qq_fmt, (int(np.prod(shape)), K), dtype).reshape(*shape, K)
    w = strategies.exact_weight(rng, qq_fmt, 15, K, dtype)
    oracle.assert_equal(qqmm(qq_fmt, x, w), oracle.f64(x) @ oracle.decode(qq_fmt, w).T)


def test_global_scales_multiply(nv_fmt, dtype, rng):
    """Powers of two as factors: the product is exactly that of the scaled operands."""
    x = exact_rows(rng, nv_fmt, (5, 64), dtype)
    w = strategies.exact_weight(rng, nv_fmt, 9, 64, dtype)
    more = dict(global_scale_x=2688.0 / 2, global_scale_w=2688.0 * 8)
    want = oracle.qqmm(nv_fmt, x, w, **more).value
    oracle.assert_equal(qqmm(nv_fmt, x, w, **more), want)


@pytest.mark.parametrize("x_shape", [(0, 64), (2, 0, 64), (3, 64)])
def test_empty(qq_fmt, x_shape):
    rows = 0 if len(x_shape) == 2 and x_shape[0] == 3 else 7
    w = oracle.encode(qq_fmt, np.ones((7, 64), np.float32))
    w = Weight(*(None if a is None else a[:rows] for a in w))
    y = ops.qqmm(
        mx.zeros(x_shape), *strategies.weight_arrays(w)[:2], **strategies.format_keywords(qq_fmt)
    )
    mx.eval(y)
    assert y.shape == (*x_shape[:-1], rows)
