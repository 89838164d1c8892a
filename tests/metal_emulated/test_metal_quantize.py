"""quantize, dequantize and round_trip of kernels/metal: MLX's rules on Metal, to the bit."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
import strategies
from corpora import corpora
from hypothesis import given
from hypothesis import strategies as st

import kernels


@pytest.fixture(autouse=True)
def _rules_of_a_gpu(monkeypatch):
    monkeypatch.setattr(oracle, "on_gpu", lambda: True)


def expected(fmt, w, global_scale=None):
    """The oracle's; in a zero group of nvfp4, which MLX multiplies by 0, signs alone are left."""
    want = oracle.encode(fmt, w, global_scale)
    if fmt.mode == "nvfp4":
        signs = oracle.pack((8 * np.signbit(w)).astype(np.uint8), fmt.bits)
        of_zeros = np.repeat(want.scales == 0, 2, axis=-1)  # words of a group
        want = want._replace(words=np.where(of_zeros, signs, want.words))
    return want


def assert_same(got, want):
    np.testing.assert_array_equal(got.words, want.words)
    np.testing.assert_array_equal(oracle.bits_of(got.scales), oracle.bits_of(want.scales))
    if want.biases is not None:
        np.testing.assert_array_equal(got.biases, want.biases)


@given(data=st.data())
def test_bits_are_those_of_the_rules(fmt, dtype, data):
    rng = np.random.default_rng(data.draw(strategies.seeds))
    rows, groups = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    w = strategies.activations(rng, (rows, groups * fmt.group_size), dtype)
    scale = float(np.abs(w.astype(np.float32)).max()) if fmt.mode == "nvfp4" and rows % 2 else None
    scale = scale or None
    got = kernels.quantize(fmt, w, scale, seed=rows)
    assert_same(got, expected(fmt, w, scale))


def test_hostile_groups(fmt, dtype, rng):
    """Ties, zeros, one-hot rows, constants, only negative ones, the largest and the smallest."""
    for name, w in corpora(rng, fmt, dtype):
        if name == "subnormal" and fmt.has_biases:
            continue  # a quotient of subnormals: flushed or not is the GPU's
        try:
            assert_same(kernels.quantize(fmt, w, kind="check"), expected(fmt, w))
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def test_groups_with_nan_are_nan(fmt, dtype, rng):
    w = strategies.activations(rng, (3, 2 * fmt.group_size), dtype)
    w[0, 1] = np.nan
    w[1, -1] = np.inf
    got = oracle.decode(fmt, kernels.quantize(fmt, w))
    groups = got.reshape(3, 2, -1)
    if fmt.mode in ("mxfp4", "mxfp8"):
        assert not np.isfinite(groups[0, 0]).any() or (groups[0, 0] == 0).any()
    else:
        assert np.isnan(groups[0, 0]).all() and np.isnan(groups[1, 1]).all()
    assert np.isfinite(groups[2]).all() and np.isfinite(groups[0, 1]).all()


@pytest.mark.parametrize("rows", [1, 5])
def test_decoding(fmt, dtype, rows, rng):
    K = 3 * fmt.group_size
    w = strategies.random_weight(rng, fmt, rows, K, dtype)
    out = kernels.poisoned((rows, K), oracle.NUMPY_DTYPE[dtype])
    buffers = {1: out, 2: w.words, 3: w.scales}
    if w.biases is not None:
        buffers[4] = w.biases
    more = {}
    if fmt.mode == "nvfp4":
        buffers[5], more = np.float32([3000.0]), {"global_scale": 3000.0}
    kernels.over_groups("dequantize", fmt, dtype, buffers, 3 * rows, kind="check")
    want = oracle.decode(fmt, w, **more)
    bound = 2.0**-23 * np.abs(want).max() + oracle.ROUNDOFF[dtype] * np.abs(want)
    assert (np.abs(oracle.f64(out) - want) <= bound + oracle.UNDERFLOW[dtype]).all()


def test_the_round_trip_is_exact(qq_fmt, dtype, rng):
    """Q(x) without its global factor, in bfloat16."""
    x = strategies.activations(rng, (5, 3 * qq_fmt.group_size), dtype)
    x[2, : qq_fmt.group_size] = 0
    scale = 777.0 if qq_fmt.mode == "nvfp4" else None
    out = kernels.poisoned(x.shape, np.dtype(oracle.BF16))
    buffers = {1: x, 2: out}
    if scale:
        buffers[5] = np.float32([scale])
    kernels.over_groups("round_trip", qq_fmt, dtype, buffers, 15, kind="check")
    want = oracle.decode(qq_fmt, expected(qq_fmt, x, scale))
    np.testing.assert_array_equal(oracle.f64(out), want)
