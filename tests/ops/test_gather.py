"""gather_qmm and gather_qqmm: experts, chosen by flat indices of the batch dimensions."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit import ops
from oracle import Weight

INDEX_DTYPES = (np.uint32, np.int32, np.int64, np.uint8)


class Experts(NamedTuple):
    """x [B, M, K], w [E, N, K], a bias of each expert, and indices of one shape."""

    x: np.ndarray
    w: Weight
    bias: np.ndarray
    lhs: np.ndarray
    rhs: np.ndarray


def experts(
    rng: np.random.Generator,
    fmt: Any,
    dtype: mx.Dtype,
    *,
    E: int,
    B: int,
    M: int,
    N: int,
    K: int,
    shape: tuple[int, ...],
    exact: bool = False,
) -> Experts:
    activations = strategies.exact_activations if exact else strategies.activations
    weight = strategies.exact_weight if exact else strategies.random_weight
    x = activations(rng, (B, M, K), dtype)
    w = weight(rng, fmt, N, K, dtype, (E,))
    bias = rng.integers(-9, 10, (E, N)).astype(np.float32).astype(oracle.NUMPY_DTYPE[dtype])
    return Experts(x, w, bias, rng.integers(0, B, shape), rng.integers(0, E, shape))


def gather(
    fmt: Any,
    e: Experts,
    *,
    with_bias: bool = False,
    index_dtype: Any = np.uint32,
    layout: str = "contiguous",
    **more: Any,
) -> mx.array:
    return ops.gather_qmm(
        strategies.lay_out(e.x, layout),
        *strategies.weight_arrays(e.w, layout),
        lhs_indices=mx.array(e.lhs.astype(index_dtype)),
        rhs_indices=mx.array(e.rhs.astype(index_dtype)),
        **strategies.format_keywords(fmt),
        **strategies.optional(bias=e.bias if with_bias else None),
        **more,
    )


def reference(
    fmt: Any, e: Experts, *, with_bias: bool = False, transpose: bool = True
) -> oracle.Product:
    return oracle.gather(
        e.x,
        oracle.decode(fmt, e.w),
        e.lhs,
        e.rhs,
        bias=e.bias if with_bias else None,
        transpose=transpose,
    )


@given(data=st.data())
def test_random_bits(fmt, dtype, data):
    """Indices of any rank, experts repeated or unused, one or several rows of x for each."""
    rng = np.random.default_rng(data.draw(strategies.seeds))
    shape = data.draw(st.sampled_from([(1,), (5,), (3, 2), (2, 1, 3), (17,)]))
    K = fmt.group_size * data.draw(st.integers(1, 4))
    e = experts(
        rng,
        fmt,
        dtype,
        E=data.draw(st.integers(1, 6)),
        B=data.draw(st.integers(1, 5)),
        M=data.draw(st.sampled_from([1, 1, 2, 9])),
        N=data.draw(strategies.columns),
        K=K,
        shape=shape,
    )
    with_bias, layout = data.draw(st.booleans()), data.draw(st.sampled_from(strategies.LAYOUTS))
    y = gather(
        fmt,
        e,
        with_bias=with_bias,
        layout=layout,
        index_dtype=data.draw(st.sampled_from(INDEX_DTYPES)),
    )
    oracle.assert_close(y, reference(fmt, e, with_bias=with_bias), K, dtype=dtype)


@pytest.mark.parametrize("tokens", [1, 2, 7, 40, 129])
def test_sorted_tokens_exactly(fmt, dtype, tokens, rng):
    """The prefill of switch layers: one row a token, sorted by expert, some experts empty."""
    e = experts(
        rng, fmt, dtype, E=7, B=tokens, M=1, N=37, K=2 * fmt.group_size, shape=(tokens,), exact=True
    )
    e = e._replace(rhs=np.sort(np.where(e.rhs == 3, 4, e.rhs)))
    want = reference(fmt, e, with_bias=True).value
    for hint in (True, False):
        oracle.assert_equal(gather(fmt, e, with_bias=True, sorted_indices=hint), want)
    e = e._replace(rhs=rng.permutation(e.rhs))  # a broken promise costs time, not correctness
    want = reference(fmt, e, with_bias=True).value
    oracle.assert_equal(gather(fmt, e, with_bias=True, sorted_indices=True), want)


def test_sorted_hint_with_the_default_lhs(fmt, rng):
    """mlx-lm sorts the tokens, gives rhs_indices alone, and says so."""
    tokens = 23
    e = experts(
        rng,
        fmt,
        mx.bfloat16,
        E=5,
        B=tokens,
        M=1,
        N=18,
        K=2 * fmt.group_size,
        shape=(tokens,),
        exact=True,
    )
    e = e._replace(lhs=np.arange(tokens), rhs=np.sort(e.rhs))
    y = ops.gather_qmm(
        oracle.to_mlx(e.x),
        *strategies.weight_arrays(e.w),
        rhs_indices=mx.array(e.rhs),
        sorted_indices=True,
        **strategies.format_keywords(fmt),
    )
    oracle.assert_equal(y, reference(fmt, e).value)


def test_untransposed_exactly(fmt, dtype, rng):
    """w [E, K, N], groups along N."""
    for M in (1, 3, 12):
        N = 2 * fmt.group_size
        e = experts(rng, fmt, dtype, E=3, B=4, M=M, N=21, K=N, shape=(6,), exact=True)
        e = e._replace(x=strategies.exact_activations(rng, (4, M, 21), dtype))
        y = gather(fmt, e, transpose=False)
        assert y.shape == (6, M, N)
        oracle.assert_equal(y, reference(fmt, e, transpose=False).value)


def test_default_indices(fmt, rng):
    """Without indices, batch entry i of x meets batch entry i of w."""
    e = experts(rng, fmt, mx.float32, E=3, B=3, M=4, N=11, K=fmt.group_size, shape=(3,), exact=True)
    e = e._replace(lhs=np.arange(3), rhs=np.arange(3))
    y = ops.gather_qmm(
        oracle.to_mlx(e.x), *strategies.weight_arrays(e.w), **strategies.format_keywords(fmt)
    )
    oracle.assert_equal(y, reference(fmt, e).value)


def test_broadcast_indices(fmt, rng):
    """lhs [T, 1] and rhs [T, top]: the router's shapes; x [T, 1, 1, K] as switch layers hold it."""
    T, top = 9, 2
    e = experts(
        rng, fmt, mx.bfloat16, E=4, B=T, M=1, N=19, K=2 * fmt.group_size, shape=(T, top), exact=True
    )
    lhs = np.arange(T)[:, None]
    want = reference(fmt, e._replace(lhs=np.broadcast_to(lhs, (T, top)))).value
    oracle.assert_equal(gather(fmt, e._replace(lhs=lhs)), want)
    y = ops.gather_qmm(
        oracle.to_mlx(e.x[:, None]),
        *strategies.weight_arrays(e.w),
        rhs_indices=mx.array(e.rhs),
        **strategies.format_keywords(fmt),
    )
    assert y.shape == (T, top, 1, 19)
    oracle.assert_equal(y, want)


def test_batched_experts(fmt, rng):
    """Indices are flat over all the batch dimensions of x and of w."""
    e = experts(rng, fmt, mx.float32, E=6, B=4, M=2, N=13, K=fmt.group_size, shape=(8,), exact=True)
    words, scales, biases = strategies.weight_arrays(e.w)
    split = [None if a is None else a.reshape(2, 3, *a.shape[1:]) for a in (words, scales, biases)]
    y = ops.gather_qmm(
        oracle.to_mlx(e.x).reshape(2, 2, 2, -1),
        *split,
        lhs_indices=mx.array(e.lhs),
        rhs_indices=mx.array(e.rhs),
        **strategies.format_keywords(fmt),
    )
    oracle.assert_equal(y, reference(fmt, e).value)


def test_long_k_and_many_columns(judged_fmt, dtype, rng):
    e = experts(rng, judged_fmt, dtype, E=2, B=3, M=1, N=203, K=2048, shape=(4,))
    oracle.assert_close(gather(judged_fmt, e), reference(judged_fmt, e), 2048, dtype=dtype)


@pytest.mark.parametrize("shape", [(0,), (2, 0)])
def test_no_indices(fmt, shape, rng):
    e = experts(rng, fmt, mx.float32, E=2, B=2, M=3, N=5, K=fmt.group_size, shape=shape)
    y = gather(fmt, e)
    mx.eval(y)
    assert y.shape == (*shape, 3, 5)


def expert_scales(E: int) -> np.ndarray:
    """A different power of two for each expert, as global scales."""
    return (2688.0 * 2.0 ** (np.arange(E) - 1)).astype(np.float32)


@pytest.mark.parametrize("per_expert", [False, True])
def test_global_scale(nv_fmt, dtype, per_expert, rng):
    """One float32 scalar for all experts, or one for each."""
    e = experts(rng, nv_fmt, dtype, E=3, B=4, M=2, N=17, K=64, shape=(5,), exact=True)
    scales = expert_scales(3) if per_expert else np.float32(2688.0 * 4)
    values = oracle.decode(nv_fmt, e.w) * (np.broadcast_to(scales, 3) / 2688)[:, None, None]
    want = oracle.gather(e.x, values, e.lhs, e.rhs).value
    oracle.assert_equal(gather(nv_fmt, e, global_scale=mx.array(scales)), want)
    x = oracle.to_mlx(e.x)
    arrays, keywords = strategies.weight_arrays(e.w), strategies.format_keywords(nv_fmt)
    indices = dict(lhs_indices=mx.array(e.lhs), rhs_indices=mx.array(e.rhs))
    dy = mx.array(rng.integers(-2, 3, want.shape)).astype(dtype)
    _, (dx,) = mx.vjp(
        lambda x: [
            ops.gather_qmm(x, *arrays, global_scale=mx.array(scales), **indices, **keywords)
        ],
        [x],
        [dy],
    )
    dx_want = np.zeros(e.x.shape)
    np.add.at(dx_want, e.lhs, oracle.f64(dy) @ values[e.rhs])
    oracle.assert_equal(dx, dx_want)


@pytest.mark.parametrize("per_expert", [False, True])
def test_global_scales_of_quantized_activations(nv_fmt, dtype, per_expert, rng):
    e = experts(rng, nv_fmt, dtype, E=3, B=4, M=2, N=17, K=64, shape=(5,), exact=True)
    scales = expert_scales(3) if per_expert else np.float32(2688.0 / 2)
    scale_x = np.float32(np.abs(e.x.astype(np.float32)).max())
    values = oracle.decode(nv_fmt, e.w) * (np.broadcast_to(scales, 3) / 2688)[:, None, None]
    xq = oracle.decode(nv_fmt, oracle.encode(nv_fmt, e.x, scale_x), scale_x)
    y = ops.gather_qqmm(
        oracle.to_mlx(e.x),
        *strategies.weight_arrays(e.w)[:2],
        lhs_indices=mx.array(e.lhs),
        rhs_indices=mx.array(e.rhs),
        global_scale_x=mx.array(scale_x),
        global_scale_w=mx.array(scales),
        **strategies.format_keywords(nv_fmt),
    )
    oracle.assert_close(y, oracle.gather(xq, values, e.lhs, e.rhs), 64, dtype=dtype)


@given(data=st.data())
def test_quantized_activations(qq_fmt, dtype, data):
    """gather_qqmm: rows of x quantized as mx.quantize does, then as gather_qmm."""
    rng = np.random.default_rng(data.draw(strategies.seeds))
    K = qq_fmt.group_size * data.draw(st.integers(1, 5))
    e = experts(
        rng,
        qq_fmt,
        dtype,
        E=data.draw(st.integers(1, 5)),
        B=data.draw(st.integers(1, 5)),
        M=data.draw(st.sampled_from([1, 2, 9])),
        N=data.draw(st.integers(1, 50)),
        K=K,
        shape=data.draw(st.sampled_from([(1,), (6,), (3, 2)])),
    )
    with_bias = data.draw(st.booleans())
    xq = oracle.decode(qq_fmt, oracle.encode(qq_fmt, e.x))
    want = oracle.gather(
        xq, oracle.decode(qq_fmt, e.w), e.lhs, e.rhs, bias=e.bias if with_bias else None
    )
    y = ops.gather_qqmm(
        oracle.to_mlx(e.x),
        *strategies.weight_arrays(e.w)[:2],
        lhs_indices=mx.array(e.lhs),
        rhs_indices=mx.array(e.rhs),
        **strategies.format_keywords(qq_fmt),
        **strategies.optional(bias=e.bias if with_bias else None),
    )
    oracle.assert_close(y, want, K, dtype=dtype)
