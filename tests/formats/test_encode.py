"""quantize: the same bits as mx.quantize of MLX 0.32.4 on the same device, and as the oracle, for
hostile groups.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from corpora import corpora
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit import ops
from oracle import Weight

DTYPES = [mx.float32, mx.float16, mx.bfloat16]


def ours(fmt: Any, w: mx.array, **keywords: Any) -> Weight:
    words, scales, biases = ops.quantize(w, **strategies.format_keywords(fmt), **keywords)
    assert (biases is None) == (not fmt.has_biases)
    return Weight(*(None if a is None else oracle.to_numpy(a) for a in (words, scales, biases)))


def mlx(fmt: Any, w: mx.array, **keywords: Any) -> Weight:
    return Weight(
        *map(oracle.to_numpy, mx.quantize(w, **strategies.format_keywords(fmt), **keywords))
    )


def assert_same(got: Weight, want: Weight, note: str) -> None:
    for name, a, b in zip(Weight._fields, got, want, strict=True):
        if b is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), f"{note}: {name}"
            np.testing.assert_array_equal(
                oracle.bits_of(a), oracle.bits_of(b), err_msg=f"{note}: {name}"
            )


def follows_mlx(fmt: Any, w: np.ndarray) -> np.ndarray:
    """Rows of `w` in which MLX's own result is not one of its two defects, which are not copied.

    Both are the CPU's: e8m0 exponents below -127 wrap around to infinity; and fp4 elements beyond
    2^25 times their scale (nvfp4 saturates there) lose to float32 cancellation and become 4 or 0
    in place of 6.
    """
    if oracle.on_gpu():
        return np.ones(len(w), bool)
    amax = np.abs(w.reshape(len(w), -1, fmt.group_size)).max(-1)
    if fmt.mode == "nvfp4":
        return (amax.astype(np.float64) < 448 * 2.0**25).all(-1)
    if fmt.mode == "affine":
        return np.ones(len(w), bool)
    return (oracle.mx_exponent(fmt, amax) >= -127).all(-1)


def rows_of(w: Weight, rows: np.ndarray) -> Weight:
    return Weight(*(None if a is None else a[rows] for a in w))


def test_bits_equal_mlx(fmt, dtype, rng):
    for name, w in corpora(rng, fmt, dtype):
        got = ours(fmt, oracle.to_mlx(w))
        assert_same(got, oracle.encode(fmt, w), f"{name}, oracle")
        rows = follows_mlx(fmt, w)
        assert rows.any(), f"{name} compares nothing with MLX"
        assert_same(
            rows_of(got, rows), rows_of(mlx(fmt, oracle.to_mlx(w)), rows), f"{name}, mx.quantize"
        )


@pytest.mark.parametrize("share", [1.0, 4.0, 0.4], ids=["amax", "above", "below"])
def test_global_scale_equals_mlx(nv_fmt, dtype, share, rng):
    for name, w in corpora(rng, nv_fmt, dtype):
        global_scale = np.float32(np.abs(w.astype(np.float32)).max() * share)
        if not 1e-30 < global_scale < 1e30:  # 2688 / global_scale must stay finite
            continue
        got = ours(nv_fmt, oracle.to_mlx(w), global_scale=mx.array(global_scale))
        assert_same(got, oracle.encode(nv_fmt, w, global_scale), f"{name}, oracle")
        theirs = mlx(nv_fmt, oracle.to_mlx(w), global_scale=mx.array(global_scale))
        assert_same(got, theirs, f"{name}, mx.quantize")


@given(data=st.data())
def test_shapes_and_layouts(fmt, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    batch = data.draw(st.sampled_from([(), (1,), (3,), (2, 2)]))
    N, K = data.draw(strategies.columns), data.draw(strategies.depths(fmt.group_size))
    layout = data.draw(st.sampled_from(strategies.LAYOUTS))
    rng = np.random.default_rng(data.draw(strategies.seeds))
    w = strategies.activations(rng, (*batch, N, K), dtype)
    assert_same(ours(fmt, strategies.lay_out(w, layout)), oracle.encode(fmt, w), layout)


def test_broadcast_input(fmt):
    row = np.linspace(-1, 2, fmt.group_size, dtype=np.float32)
    w = np.broadcast_to(row, (5, fmt.group_size))
    assert_same(
        ours(fmt, mx.broadcast_to(mx.array(row), w.shape)), oracle.encode(fmt, w), "broadcast"
    )


@pytest.mark.parametrize("shape", [(0, 128), (3, 0), (0, 2, 128), (2, 0, 128)])
def test_empty(fmt, shape):
    got = ours(fmt, mx.zeros(shape))
    width = shape[-1] * fmt.bits // 32
    assert got.words.shape == (*shape[:-1], width)
    assert got.scales.shape == (*shape[:-1], shape[-1] // fmt.group_size)


# --- the element rules, stated one by one -----------------------------------------------------


def fp4_codes(fmt: Any, values: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """Codes of `values` in a group that also holds 6, so that its scale is 1."""
    group = np.zeros((1, fmt.group_size), oracle.NUMPY_DTYPE[dtype])
    group[0, 0], group[0, 1 : 1 + len(values)] = 6, values
    got = ours(fmt, oracle.to_mlx(group))
    assert oracle.scale_values(fmt)[got.scales[0, 0]] == 1
    return oracle.unpack(got.words, 4)[0, 1 : 1 + len(values)]


@pytest.mark.parametrize("sign", [1, -1])
def test_fp4_ties(fp4_fmt, dtype, sign):
    """To the smaller magnitude on the CPU (0.75 -> 0.5), to the even code on a GPU (0.75 -> 1)."""
    storage = oracle.NUMPY_DTYPE[dtype]
    ties = (np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]) * sign).astype(storage)
    lower, upper = np.array([0, 0.5, 1, 1.5, 2, 3, 4]), np.array([0.5, 1, 1.5, 2, 3, 4, 6])
    ours_go_up = oracle.on_gpu() * np.array([0, 1, 0, 1, 0, 1, 0])
    for values, want in [
        (ties, np.where(ours_go_up, upper, lower)),
        (np.nextafter(ties, storage.type(9 * sign)), upper),
        (np.nextafter(ties, storage.type(0)), lower),
    ]:
        codes = fp4_codes(fp4_fmt, values, dtype)
        np.testing.assert_array_equal(oracle.E2M1_VALUES[codes], want * sign)


def test_fp4_zeros(fp4_fmt, dtype):
    """The CPU has no negative zero; a GPU keeps the sign."""
    codes = fp4_codes(fp4_fmt, np.array([-0.0, -1e-3, -0.25, 0.0, 1e-3, 0.25]), dtype)
    np.testing.assert_array_equal(codes, [8 * oracle.on_gpu()] * 3 + [0] * 3)


def test_e4m3_is_nearest_even(dtype):
    """All e4m3 values, all their midpoints and the neighbours of those, in groups of scale 1."""
    grid = np.arange(0x7F, dtype=np.uint8).view(oracle.E4M3).astype(np.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate([grid, middles, middles * (1 + 2**-7), middles * (1 - 2**-8)])
    values = np.concatenate([values, -values]).astype(oracle.NUMPY_DTYPE[dtype])
    groups = np.resize(values, (-(-len(values) // 31), 31))
    w = np.concatenate([groups, np.full((len(groups), 1), 448, values.dtype)], 1)
    words, scales, _ = ops.quantize(oracle.to_mlx(w), mode="mxfp8")
    assert (np.array(scales) == 127).all()
    codes = oracle.unpack(np.array(words), 8)[:, :31]
    np.testing.assert_array_equal(
        codes, groups.astype(np.float32).astype(oracle.E4M3).view(np.uint8)
    )


def test_zero_groups(fmt, dtype):
    """They decode to zero; which scale and codes say so depends on the device."""
    got = ours(fmt, mx.zeros((3, 2 * fmt.group_size), dtype))
    assert not oracle.decode(fmt, got).any()
    gpu = oracle.on_gpu()
    assert (got.words == (0x77777777 if gpu and fmt.mode == "nvfp4" else 0)).all()
    if fmt.mode == "affine":
        assert not got.biases.any()
        np.testing.assert_array_equal(got.scales, np.float32(-1e-7).astype(got.scales.dtype))
    else:
        assert (got.scales == (0 if gpu or fmt.mode == "nvfp4" else 127)).all()


def test_affine_range_of_negative_groups(affine_fmt, dtype):
    """All in [-2, -1]: the grid ends at the largest on the CPU, at zero on a GPU."""
    w = -np.linspace(1, 2, affine_fmt.group_size, dtype=np.float32)[None]
    got = ours(affine_fmt, oracle.to_mlx(w.astype(oracle.NUMPY_DTYPE[dtype])))
    codes, steps = oracle.unpack(got.words, affine_fmt.bits)[0], 2**affine_fmt.bits - 1
    assert got.biases[0, 0] == -2 and codes[-1] == 0
    assert codes.max() in ((steps // 2, steps // 2 + 1) if oracle.on_gpu() else (steps,))


def test_mx_groups_below_the_smallest_scale_stay_finite(mx_fmt):
    """amax / max below 2^-127: byte 0 and elements of that scale. MLX's byte wraps to 255."""
    w = np.exp2(-np.arange(127, 127 + 22, dtype=np.float64))[:, None] * np.linspace(-1, 1, 32)
    w = w.astype(np.float32)
    got = ours(mx_fmt, mx.array(w))
    assert_same(got, oracle.encode(mx_fmt, w), "oracle")
    assert np.isfinite(oracle.decode(mx_fmt, got)).all()


def test_nvfp4_saturates_at_both_levels(nv_fmt, dtype):
    """Beyond 2688 the scale stays 448 and the largest elements become +-6, however large."""
    peaks = [3e3, 6e4] if dtype == mx.float16 else [3e3, 1e6, 1e12, 3e38]
    for peak in peaks:
        w = np.zeros((2, 16), oracle.NUMPY_DTYPE[dtype])
        w[0, 5], w[1, 2] = peak, -peak
        got = ours(nv_fmt, oracle.to_mlx(w))
        codes = oracle.unpack(got.words, 4)
        assert (got.scales == 0x7E).all() and (codes[0, 5], codes[1, 2]) == (7, 15), peak
