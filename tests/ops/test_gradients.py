"""vjp and jvp of every op, on integers whose sums float32 holds exactly: equality with the analytic
derivative in float64, and the derived tolerance in 16 bits."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import ops
from oracle import Weight

ROWS = (1, 5, 20)
DTYPES = [mx.float32, mx.bfloat16]


def integers(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype = mx.float32
) -> np.ndarray:
    return strategies.exact_activations(rng, shape, dtype)


def vjp(f: Any, primals: list[mx.array], dy: np.ndarray) -> list[mx.array]:
    """Gradients of f at `primals`, with their dtypes and shapes checked."""
    _, grads = mx.vjp(lambda *a: [f(*a)], primals, [oracle.to_mlx(dy)])
    for primal, grad in zip(primals, grads, strict=True):
        assert grad.shape == primal.shape and grad.dtype == primal.dtype
    return grads


def codes(fmt: Any, w: Weight) -> np.ndarray:
    return oracle.unpack(w.words, fmt.bits).astype(np.float64)


def by_group(fmt: Any, dense: np.ndarray) -> np.ndarray:
    """Sums over the groups of the last dimension."""
    return dense.reshape(*dense.shape[:-1], -1, fmt.group_size).sum(-1)


@pytest.mark.parametrize("dtype16", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("transpose", [True, False])
def test_x(fmt, dtype16, transpose, rng):
    """dx = dy @ W, or dy @ W^T where the product itself was untransposed."""
    for M in ROWS:
        w = strategies.exact_weight(rng, fmt, 37, 2 * fmt.group_size, dtype16)
        values = oracle.decode(fmt, w) if transpose else oracle.decode(fmt, w).T
        x, dy = (
            integers(rng, (M, values.shape[1]), dtype16),
            integers(rng, (M, values.shape[0]), dtype16),
        )
        arrays, keywords = strategies.weight_arrays(w), strategies.format_keywords(fmt)
        (dx,) = vjp(
            lambda x, a=arrays, k=keywords: ops.quantized_matmul(x, *a, transpose=transpose, **k),
            [oracle.to_mlx(x)],
            dy,
        )
        oracle.assert_equal(dx, oracle.f64(dy) @ values)


def test_x_with_leading_dimensions_and_batched_weights(fmt, rng):
    w = strategies.exact_weight(rng, fmt, 11, fmt.group_size, mx.float32, (3,))
    values = oracle.decode(fmt, w)
    x, dy = integers(rng, (2, 3, 4, fmt.group_size)), integers(rng, (2, 3, 4, 11))
    arrays, keywords = strategies.weight_arrays(w), strategies.format_keywords(fmt)
    (dx,) = vjp(lambda x: ops.quantized_matmul(x, *arrays, **keywords), [oracle.to_mlx(x)], dy)
    oracle.assert_equal(dx, dy.astype(np.float64) @ values)


@pytest.mark.parametrize("transpose", [True, False])
def test_affine_scales_biases_and_bias(affine_fmt, transpose, rng):
    """With dW = dy^T x: d scale = sum of dW q over a group, d bias of the group = sum of dW."""
    g = affine_fmt.group_size
    for M in ROWS:
        w = strategies.exact_weight(rng, affine_fmt, 9, 2 * g, mx.float32)
        rows, columns = (9, 2 * g) if transpose else (2 * g, 9)
        x, dy = integers(rng, (M, columns)), integers(rng, (M, rows))
        words, scales, biases = strategies.weight_arrays(w)

        def f(
            s: mx.array, b: mx.array, bias: mx.array, x: np.ndarray = x, words: mx.array = words
        ) -> mx.array:
            return ops.quantized_matmul(
                oracle.to_mlx(x),
                words,
                s,
                b,
                bias=bias,
                transpose=transpose,
                **strategies.format_keywords(affine_fmt),
            )

        ds, db, dbias = vjp(f, [scales, biases, mx.zeros(rows)], dy)
        dense = dy.T.astype(np.float64) @ x if transpose else x.T.astype(np.float64) @ dy
        oracle.assert_equal(ds, by_group(affine_fmt, dense * codes(affine_fmt, w)))
        oracle.assert_equal(db, by_group(affine_fmt, dense))
        oracle.assert_equal(dbias, dy.sum(0, dtype=np.float64))


def test_dequantize(affine_fmt, rng):
    w = strategies.exact_weight(rng, affine_fmt, 7, 2 * affine_fmt.group_size, mx.float32)
    dy = integers(rng, (7, 2 * affine_fmt.group_size))
    words, scales, biases = strategies.weight_arrays(w)
    ds, db = vjp(
        lambda s, b: ops.dequantize(words, s, b, **strategies.format_keywords(affine_fmt)),
        [scales, biases],
        dy,
    )
    oracle.assert_equal(ds, by_group(affine_fmt, dy * codes(affine_fmt, w)))
    oracle.assert_equal(db, by_group(affine_fmt, dy.astype(np.float64)))


def gather_case(
    fmt: Any, rng: np.random.Generator, transpose: bool, dtype: mx.Dtype = mx.float32
) -> tuple[Any, ...]:
    """Repeated rows of x, repeated and unused experts."""
    w = strategies.exact_weight(rng, fmt, 10, fmt.group_size, dtype, (4,))
    values = oracle.decode(fmt, w)
    inner, outer = values.shape[:0:-1] if transpose else values.shape[1:]
    lhs, rhs = np.array([[0, 2], [1, 1], [0, 0]]), np.array([[3, 0], [0, 0], [1, 3]])
    x, dy = integers(rng, (3, 2, inner), dtype), integers(rng, (3, 2, 2, outer), dtype)
    return w, values, lhs, rhs, x, dy


@pytest.mark.parametrize("dtype16", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("transpose", [True, False])
def test_gather_x(fmt, dtype16, transpose, rng):
    """What several pairs read of x is summed in float32 and rounded once."""
    w, values, lhs, rhs, x, dy = gather_case(fmt, rng, transpose, dtype16)
    arrays, keywords = strategies.weight_arrays(w), strategies.format_keywords(fmt)
    (dx,) = vjp(
        lambda x: ops.gather_qmm(
            x,
            *arrays,
            lhs_indices=mx.array(lhs),
            rhs_indices=mx.array(rhs),
            transpose=transpose,
            **keywords,
        ),
        [oracle.to_mlx(x)],
        dy,
    )
    want = np.zeros(x.shape)
    np.add.at(
        want, lhs, oracle.f64(dy) @ (values[rhs] if transpose else np.swapaxes(values, -1, -2)[rhs])
    )
    oracle.assert_equal(dx, want)


@pytest.mark.parametrize("transpose", [True, False])
def test_gather_scales_biases_and_bias(affine_fmt, transpose, rng):
    """An expert's gradient is the sum over the pairs that chose it; zero where none did."""
    w, values, lhs, rhs, x, dy = gather_case(affine_fmt, rng, transpose)
    words, scales, biases = strategies.weight_arrays(w)

    def f(s: mx.array, b: mx.array, bias: mx.array) -> mx.array:
        return ops.gather_qmm(
            oracle.to_mlx(x),
            words,
            s,
            b,
            lhs_indices=mx.array(lhs),
            rhs_indices=mx.array(rhs),
            bias=bias,
            transpose=transpose,
            **strategies.format_keywords(affine_fmt),
        )

    ds, db, dbias = vjp(f, [scales, biases, mx.zeros((4, dy.shape[-1]))], dy)
    dense, dbias_want = np.zeros(values.shape), np.zeros((4, dy.shape[-1]))
    left, right = (dy, x[lhs]) if transpose else (x[lhs], dy)
    np.add.at(dense, rhs, np.swapaxes(left, -1, -2).astype(np.float64) @ right)
    np.add.at(dbias_want, rhs, dy.sum(-2, dtype=np.float64))
    oracle.assert_equal(ds, by_group(affine_fmt, dense * codes(affine_fmt, w)))
    oracle.assert_equal(db, by_group(affine_fmt, dense))
    oracle.assert_equal(dbias, dbias_want)


@pytest.mark.parametrize("M, groups, dtype16", [(6, 4, mx.float32), (40, 3, mx.bfloat16)])
def test_qqmm_is_straight_through(qq_fmt, M, groups, dtype16, rng):
    """Rounding x counts as the identity: dx = dy @ W, and d bias = sum of dy."""
    K = groups * qq_fmt.group_size
    w = strategies.exact_weight(rng, qq_fmt, 21, K, dtype16)
    x, dy = integers(rng, (M, K), dtype16), integers(rng, (M, 21), dtype16)
    arrays = strategies.weight_arrays(w)[:2]
    dx, dbias = vjp(
        lambda x, b: ops.qqmm(x, *arrays, bias=b, **strategies.format_keywords(qq_fmt)),
        [oracle.to_mlx(x), mx.zeros(21, dtype16)],
        dy,
    )
    oracle.assert_equal(dx, dy.astype(np.float64) @ oracle.decode(qq_fmt, w))
    oracle.assert_equal(dbias, dy.sum(0, dtype=np.float64))


def test_gather_qqmm_is_straight_through(qq_fmt, rng):
    w, values, lhs, rhs, x, dy = gather_case(qq_fmt, rng, True)
    arrays = strategies.weight_arrays(w)[:2]
    (dx,) = vjp(
        lambda x: ops.gather_qqmm(
            x,
            *arrays,
            lhs_indices=mx.array(lhs),
            rhs_indices=mx.array(rhs),
            **strategies.format_keywords(qq_fmt),
        ),
        [oracle.to_mlx(x)],
        dy,
    )
    want = np.zeros(x.shape)
    np.add.at(want, lhs, dy @ values[rhs])
    oracle.assert_equal(dx, want)


def test_global_scale_takes_part(nv_fmt, rng):
    w = strategies.exact_weight(rng, nv_fmt, 12, 64, mx.float32)
    x, dy, scale = integers(rng, (3, 64)), integers(rng, (3, 12)), mx.array(2688.0 * 4)
    arrays, keywords = strategies.weight_arrays(w), strategies.format_keywords(nv_fmt)
    (dx,) = vjp(
        lambda x: ops.quantized_matmul(x, *arrays, global_scale=scale, **keywords),
        [oracle.to_mlx(x)],
        dy,
    )
    oracle.assert_equal(dx, dy @ oracle.decode(nv_fmt, w, 2688.0 * 4))
    (dx,) = vjp(
        lambda x: ops.qqmm(
            x, *arrays[:2], global_scale_x=mx.array(9.0), global_scale_w=scale, **keywords
        ),
        [oracle.to_mlx(x)],
        dy,
    )
    oracle.assert_equal(dx, dy @ oracle.decode(nv_fmt, w, 2688.0 * 4))


@pytest.mark.parametrize("dtype16", DTYPES, ids=["float32", "bfloat16"])
def test_linear(dtype16, rng):
    for M in ROWS:
        x, w = integers(rng, (2, M, 31), dtype16), integers(rng, (13, 31), dtype16)
        dy = integers(rng, (2, M, 13), dtype16)
        dx, dw, dbias = vjp(
            lambda x, w, b: ops.linear(x, w, bias=b),
            [oracle.to_mlx(x), oracle.to_mlx(w), mx.zeros(13, dtype16)],
            dy,
        )
        flat = oracle.f64(dy).reshape(-1, 13)
        oracle.assert_equal(dx, oracle.f64(dy) @ oracle.f64(w))
        oracle.assert_equal(dw, flat.T @ oracle.f64(x).reshape(-1, 31))
        oracle.assert_equal(dbias, flat.sum(0))


def test_through_a_small_network(judged_fmt, rng):
    """grad of a loss over two layers and a nonlinearity, against the same with dense weights."""
    weights = [strategies.exact_weight(rng, judged_fmt, 128, 128, mx.float32) for _ in range(2)]
    arrays = [strategies.weight_arrays(w) for w in weights]
    dense = [mx.array(oracle.decode(judged_fmt, w).astype(np.float32)) for w in weights]
    keywords = strategies.format_keywords(judged_fmt)

    def ours(x: mx.array) -> mx.array:
        h = mx.tanh(ops.quantized_matmul(x, *arrays[0], **keywords) / 128)
        return ops.quantized_matmul(h, *arrays[1], **keywords).square().mean()

    def plain(x: mx.array) -> mx.array:
        return (mx.tanh(x @ dense[0].T / 128) @ dense[1].T).square().mean()

    x = mx.array(rng.standard_normal((4, 128)).astype(np.float32))
    assert mx.allclose(
        mx.grad(ours)(x),
        mx.grad(plain)(x),
        rtol=1e-4,
        atol=1e-4 * float(mx.grad(plain)(x).abs().max()),
    )


def test_second_order(judged_fmt, rng):
    """The product is linear in x: the gradient of its energy's gradient is a quadratic form's."""
    w = strategies.exact_weight(rng, judged_fmt, 16, 128, mx.float32)
    arrays, keywords = strategies.weight_arrays(w), strategies.format_keywords(judged_fmt)

    def energy(x: mx.array) -> mx.array:
        return 0.5 * ops.quantized_matmul(x, *arrays, **keywords).square().sum()

    x = mx.array(rng.standard_normal((2, 128)).astype(np.float32))
    t = mx.array(rng.standard_normal((2, 128)).astype(np.float32))
    hessian_vector = mx.grad(lambda x: (mx.grad(energy)(x) * t).sum())(x)
    values = oracle.decode(judged_fmt, w)
    want = oracle.f64(t) @ values.T @ values
    assert np.linalg.norm(oracle.f64(hessian_vector) - want) <= 1e-5 * np.linalg.norm(want)


def test_jvp_of_x(fmt, rng):
    w = strategies.exact_weight(rng, fmt, 15, 2 * fmt.group_size, mx.float32)
    x, t = integers(rng, (4, 2 * fmt.group_size)), integers(rng, (4, 2 * fmt.group_size))
    arrays, keywords = strategies.weight_arrays(w), strategies.format_keywords(fmt)
    _, (dy,) = mx.jvp(
        lambda x: [ops.quantized_matmul(x, *arrays, bias=mx.ones(15), **keywords)],
        [oracle.to_mlx(x)],
        [oracle.to_mlx(t)],
    )
    oracle.assert_equal(dy, t @ oracle.decode(fmt, w).T)


def test_packed_weights_have_no_derivative(fmt):
    """An exception that names what cannot be differentiated, not a zero and not a crash."""
    w = strategies.exact_weight(np.random.default_rng(0), fmt, 4, fmt.group_size, mx.float32)
    words, scales, biases = strategies.weight_arrays(w)
    x, keywords = mx.ones((2, fmt.group_size)), strategies.format_keywords(fmt)
    with pytest.raises(ValueError, match=r"packed|derivative|gradient"):
        mx.eval(
            mx.vjp(
                lambda q: [ops.quantized_matmul(x, q, scales, biases, **keywords)],
                [words],
                [mx.ones((2, 4))],
            )[1]
        )
    if not fmt.has_biases:
        with pytest.raises(ValueError, match="scale"):
            mx.eval(
                mx.vjp(
                    lambda s: [ops.quantized_matmul(x, words, s, **keywords)],
                    [scales],
                    [mx.ones((2, 4))],
                )[1]
            )
