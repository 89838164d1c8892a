"""matvec, matmul and vecmat of kernels/metal against the float64 oracle."""

from __future__ import annotations

import emulator
import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit import _ext, formats

import kernels

ORDERS = [("forward", 0), ("reverse", 0), ("per_rendezvous", 1), ("greedy", 1), ("greedy", 2)]
DTYPES = (mx.float32, mx.float16, mx.bfloat16)
FAMILIES = ("matvec", "matmul", "vecmat")


def columns(family, fmt, N):
    """A number of columns near N that w may have: as [K, N] it is packed along N."""
    return -(-N // fmt.group_size) * fmt.group_size if family == "vecmat" else N


def operands(rng, family, fmt, dtype, M, N, K, bias, global_scale):
    """x, w and further operands; the same as the oracle takes."""
    more = {}
    if bias:
        more["bias"] = strategies.activations(rng, (N,), dtype)
    if global_scale and fmt.mode == "nvfp4":
        more["global_scale"] = float(np.float32(rng.uniform(1, 5000)))
    x = strategies.activations(rng, (M, K), dtype)
    shape = (K, N) if family == "vecmat" else (N, K)
    return x, strategies.random_weight(rng, fmt, *shape, dtype), more


def check(family, fmt, dtype, M, N, K, tokens, rng, **launch):
    N = columns(family, fmt, N)
    bias, scaled = M % 2 == 1, (N + K) % 3 != 0
    x, w, more = operands(rng, family, fmt, dtype, M, N, K, bias, scaled)
    y, report = kernels.product(family, fmt, x, w, tokens, **more, **launch)
    assert report.problems == 0, report.messages
    want = oracle.quantized_matmul(fmt, x, w, transpose=family != "vecmat", **more)
    oracle.assert_close(oracle.to_mlx(y), want, K)


@pytest.mark.parametrize("family", [*FAMILIES, "quantize"])
def test_every_instance_type_checks(fmt, family):
    emulator.typecheck(kernels.source(family, fmt))


def test_sorting_type_checks():
    emulator.typecheck(kernels.source("group"))


@pytest.mark.parametrize("family", FAMILIES)
@given(data=st.data())
def test_random_bits(fmt, dtype, family, data):
    tokens = data.draw(st.sampled_from(kernels.tiles(family)))
    M = data.draw(st.integers(1, min(2 * tokens + 1, 140)))
    N = data.draw(st.integers(1, 80))
    groups = data.draw(st.integers(1, 20 if fmt.group_size < 64 else 5))
    order, seed = data.draw(st.sampled_from(ORDERS))
    rng = np.random.default_rng(data.draw(strategies.seeds))
    check(
        family, fmt, dtype, M, N, groups * fmt.group_size, tokens, rng,
        simdgroups=data.draw(st.integers(1, 3)), order=order, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_no_race_and_nothing_out_of_bounds(fmt, dtype, family, rng):
    """Every instance; in every tile and format an edge a dtype: rows of x and w that are not there,
    a part of K, half a chunk of nvfp4."""
    for tokens in kernels.tiles(family):
        edges = (tokens, 32, 4), (tokens + 1, 33, 1), (max(1, tokens - 3), 70, 5)
        M, N, groups = edges[(fmt.id + DTYPES.index(dtype)) % 3]
        for kind in ("check", "run"):
            check(
                family, fmt, dtype, M, N, groups * fmt.group_size, tokens, rng,
                kind=kind, seed=M, simdgroups=2,
            )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_orders_agree(judged_fmt, family, rng):
    """The order of threads changes no bit."""
    N, K = columns(family, judged_fmt, 45), 4 * judged_fmt.group_size
    x, w, more = operands(rng, family, judged_fmt, mx.bfloat16, 9, N, K, True, True)
    tokens = kernels.tiles(family)[0]
    results = [
        kernels.product(family, judged_fmt, x, w, tokens, order=order, seed=seed, **more)[0]
        for order, seed in ORDERS
    ]
    for y in results[1:]:
        np.testing.assert_array_equal(oracle.bits_of(y), oracle.bits_of(results[0]))


def test_a_scale_of_another_dtype(affine_fmt, rng):
    """x in float32, scales in bfloat16, as mixed models have it."""
    w = strategies.random_weight(rng, affine_fmt, 9, 2 * affine_fmt.group_size, mx.bfloat16)
    x = strategies.activations(rng, (3, 2 * affine_fmt.group_size), mx.float32)
    for family in ("matvec", "matmul"):
        y, report = kernels.product(family, affine_fmt, x, w, 8)
        assert report.problems == 0
        oracle.assert_close(oracle.to_mlx(y), oracle.quantized_matmul(affine_fmt, x, w), x.shape[1])


@pytest.mark.parametrize("family", ["matvec", "matmul"])
@pytest.mark.parametrize("exponent", [-30, 20])
def test_block_scales_beyond_float16(mx_fmt, family, exponent, rng):
    """Weights of 2^20 or 2^-30 that x brings back to where float16 holds the result."""
    x, w, _ = operands(rng, family, mx_fmt, mx.float16, 9, 33, 96, False, False)
    w = w._replace(scales=(w.scales.astype(int) + exponent).astype(np.uint8))
    x = (x.astype(np.float32) * 2.0 ** (-14 if exponent > 0 else 10)).astype(np.float16)
    y, report = kernels.product(family, mx_fmt, x, w, 8)
    assert report.problems == 0, report.messages
    oracle.assert_close(oracle.to_mlx(y), oracle.quantized_matmul(mx_fmt, x, w), 96)


# --- pairs --------------------------------------------------------------------------------------


def experts(rng, fmt, dtype, matrices, N, K):
    parts = [strategies.random_weight(rng, fmt, N, K, dtype) for _ in range(matrices)]
    stacked = [None if a[0] is None else np.stack(a) for a in zip(*parts, strict=True)]
    return parts, oracle.Weight(*stacked)


@pytest.mark.parametrize("kind", ["run", "check"])
@pytest.mark.parametrize("family", FAMILIES)
def test_pairs(fmt, dtype, family, kind, rng):
    """Experts with no row, with many, and pairs whose indices do not exist."""
    turn = (fmt.id + DTYPES.index(dtype)) % 2
    M, matrices, x_matrices = 1 + 2 * turn, 5, 4
    N, K = columns(family, fmt, 37), 3 * fmt.group_size
    shape = (K, N) if family == "vecmat" else (N, K)
    parts, w = experts(rng, fmt, dtype, matrices, *shape)
    x = strategies.activations(rng, (x_matrices, M, K), dtype)
    bias = strategies.activations(rng, (matrices, N), dtype)
    rhs = np.array([2, 0, 2, 4, 2, 2, -1, 0, 2, matrices, 2, 2, 4, 2, 2, 2])
    lhs = rng.integers(0, x_matrices, len(rhs))
    lhs[3] = x_matrices
    tokens = kernels.tiles(family)[turn % len(kernels.tiles(family))]
    y, report = kernels.product(
        family, fmt, x, w, tokens, lhs=lhs, rhs=rhs, bias=bias, kind=kind, seed=M
    )
    assert report.problems == 0, report.messages
    for i, (a, b) in enumerate(zip(lhs, rhs, strict=True)):
        if not (0 <= b < matrices and a < x_matrices):
            assert np.isnan(y[i].astype(np.float32)).all()
            continue
        transpose = family != "vecmat"
        want = oracle.quantized_matmul(fmt, x[a], parts[b], bias=bias[b], transpose=transpose)
        oracle.assert_close(oracle.to_mlx(y[i]), want, K)


@pytest.mark.parametrize("pairs, M, matrices", [(1, 1, 1), (33, 2, 7), (100, 1, 40), (64, 3, 130)])
@pytest.mark.parametrize("kind", ["run", "check"])
def test_rows_are_sorted_by_matrix(pairs, M, matrices, kind, rng):
    rhs = rng.integers(-1, matrices + 1, pairs)
    got = kernels.group(rhs, M, matrices, kind, seed=pairs)
    chosen = np.where((rhs < 0) | (rhs >= matrices), matrices, rhs)
    order = np.argsort(chosen, kind="stable")
    rows = (order[:, None] * M + np.arange(M)).reshape(-1)
    starts = np.concatenate([[0], np.cumsum(np.bincount(chosen, minlength=matrices + 1))]) * M
    np.testing.assert_array_equal(got, np.concatenate([rows, starts]))


# --- traffic ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 4, 8])
def test_matvec_reads_weights_once(judged_fmt, tokens, rng):
    x, w, _ = operands(
        rng, "matvec", judged_fmt, mx.bfloat16, tokens, 16, 8 * judged_fmt.group_size, 0, 0
    )
    _, report = kernels.product("matvec", judged_fmt, x, w, tokens, kind="check")
    assert report.read[2] == w.words.nbytes


def test_few_rows_of_x_are_read_with_the_weights(rng):
    """M = 16, K = N = 4096 in 4 bits, as the plan has it: hardly more than all bytes."""
    fmt = formats.get(bits=4, group_size=64)
    _, kernel, tokens, simdgroups, _ = _ext.metal_plan(fmt.id, 2, 16, 4096, 4096)
    assert kernels.KERNELS[kernel] == "matmul"
    x, w, _ = operands(rng, "matmul", fmt, mx.bfloat16, 16, 4096, 4096, 0, 0)
    y, report = kernels.product("matmul", fmt, x, w, tokens, kind="check", simdgroups=simdgroups)
    assert report.problems == 0, report.messages
    packed = w.words.nbytes + w.scales.nbytes + w.biases.nbytes
    assert sum(report.read.values()) <= 1.1 * (packed + x.nbytes + y.nbytes)
    oracle.assert_close(oracle.to_mlx(y), oracle.quantized_matmul(fmt, x, w), 4096)
