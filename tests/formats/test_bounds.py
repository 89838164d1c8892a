"""How far quantize may move a value, derived from each format's grid, for hostile groups.

float32 input; 16-bit storage of affine scales and biases adds its own rounding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import oracle
import strategies
from corpora import corpora
from mlx_lowbit import formats, ops


class Groups(NamedTuple):
    """One corpus, quantized and decoded: x, y [groups, g]; scale, amax [groups]."""

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    amax: np.ndarray
    octets: np.ndarray

    @property
    def error(self) -> np.ndarray:
        return np.abs(self.y - self.x)


def quantized_groups(fmt: Any, w: np.ndarray) -> Groups:
    words, scales, biases = ops.quantize(oracle.to_mlx(w), **strategies.format_keywords(fmt))
    q = oracle.Weight(
        np.array(words),
        oracle.to_numpy(scales),
        None if biases is None else oracle.to_numpy(biases),
    )
    x = oracle.f64(w).reshape(-1, fmt.group_size)
    octets = q.scales.reshape(-1)
    scale = oracle.f64(octets) if fmt.has_biases else oracle.scale_values(fmt)[octets]
    return Groups(x, oracle.decode(fmt, q).reshape(x.shape), scale, np.abs(x).max(-1), octets)


def test_affine_error_and_scale(affine_fmt, dtype, rng):
    """|w_hat - w| <= max(|s| / 2, s0 (1 - 2^-b)) + 4 ulp, with s0 = range / n and n = 2^b - 1.

    On a GPU the range reaches up to zero at least.

    The edge lies e >= n / 2 steps s0 from zero; the scale becomes edge / rint(e), so |s| / s0 is
    between n / (n + 1) = 1 - 2^-b and, where e rounds down to (n - 1) / 2, n / (n - 1). The far
    end falls short by n s0 / (n + 1) at most.
    """
    steps, width = 2**affine_fmt.bits - 1, 2.0**-affine_fmt.bits
    for name, w in corpora(rng, affine_fmt, dtype):
        g = quantized_groups(affine_fmt, w)
        highest = np.maximum(g.x.max(-1), 0) if oracle.on_gpu() else g.x.max(-1)
        s0 = np.maximum((highest - g.x.min(-1)) / steps, 1e-7)
        stored = 0 if dtype == mx.float32 else oracle.ROUNDOFF[dtype]
        smallest = 2.0**-25 if dtype == mx.float16 else 0  # half a subnormal step of the scale
        slack = (
            4 * 2.0**-23 * g.amax + stored * (steps * np.abs(g.scale) + g.amax) + smallest * steps
        )
        limit = np.maximum(np.abs(g.scale) / 2, s0 * (1 - width)) + slack
        assert (g.error <= limit[:, None]).all(), (name, (g.error - limit[:, None]).max())
        wide = (s0 > 1e-7) & (np.abs(g.scale) > 2.0**-14)
        ratio = np.abs(g.scale[wide]) / s0[wide]
        assert (ratio >= (1 - width) * (1 - stored - 1e-6)).all(), name
        assert (ratio <= steps / (steps - 1) * (1 + stored + 1e-6)).all(), name


def fp4_step(x: np.ndarray) -> np.ndarray:
    """Half the distance between e2m1 values around x (the largest, where x is on a boundary)."""
    return np.where(x < 2, 0.25, np.where(x < 4, 0.5, 1.0))


def test_mxfp8_error(rng):
    fmt = formats.get("mxfp8")
    for name, w in corpora(rng, fmt, mx.float32):
        g = quantized_groups(fmt, w)
        usable = g.amax > 448 * 2.0**-127
        limit = np.maximum(np.abs(g.x) / 16, g.scale[:, None] * 2.0**-10)
        assert (g.error <= limit)[usable].all(), name
        assert (g.amax <= 448 * g.scale)[usable].all(), name
        assert (g.amax > 224 * g.scale * (1 - 1e-6))[usable].all(), name
        assert (g.error <= g.amax[:, None] / 16)[usable].all(), name


def test_mxfp4_error(rng):
    fmt = formats.get("mxfp4")
    for name, w in corpora(rng, fmt, mx.float32):
        g = quantized_groups(fmt, w)
        usable = g.amax > 6 * 2.0**-127
        scale = g.scale[:, None]
        assert (g.error <= scale * fp4_step(np.abs(g.x) / scale) * (1 + 1e-6))[usable].all(), name
        assert (g.amax <= 6 * g.scale * (1 + 1e-6))[usable].all(), name
        assert (g.error <= 0.2 * g.amax[:, None])[usable].all(), name


def test_nvfp4_error(rng):
    fmt = formats.get("nvfp4")
    for name, w in corpora(rng, fmt, mx.float32):
        g = quantized_groups(fmt, w)
        normal = (g.octets >= 8) & (g.amax <= 2688)
        scale = np.where(g.scale == 0, 1, g.scale)[:, None]
        x = np.abs(g.x) / scale
        limit = scale * np.where(x > 6, x - 6 + 1e-6, fp4_step(x) * (1 + 1e-6))
        assert (g.error <= limit)[normal].all(), name
        assert (np.abs(g.scale - g.amax / 6) <= np.maximum(g.scale, g.amax / 6) / 16)[
            normal
        ].all(), name
        # One step of S at |x| = 5 S, in a group whose amax of 5.625 S was rounded up to 6 S.
        assert (g.error <= g.amax[:, None] / 5.625 * (1 + 1e-6))[normal].all(), name
        flushed = g.octets == 0
        assert not g.y[flushed].any(), name
        assert (g.amax[flushed] <= 6 * 2.0**-10 * (1 + 1e-6)).all(), name
        subnormal = (g.octets > 0) & (g.octets < 8)
        assert (g.error <= 0.34 * g.amax[:, None])[subnormal].all(), name


def test_nvfp4_global_scale_reaches_small_tensors(nv_fmt, dtype, rng):
    """With the tensor's amax A as global_scale every group gets a normal scale and keeps its bound.

    All below is in units of A / 2688, in which a scale S is an e4m3 value and f = 2688 / A enlarges
    w. The arithmetic rounds amax / 6 and w / S to the dtype of w before it multiplies by f, so a
    value v arrives as v' with |v' - v| <= e(v) = v u + f h. u is the dtype's roundoff and three of
    float32 (quotient, f, product); h is half the distance between subnormals, where the quotients
    of a small float16 tensor lie.

    - S is the e4m3 value nearest to v', v = amax / 6. |S - v'| <= v' / 17, reached at 17/16 of a
      power of two, so |S - v| <= (v + e(v)) / 17 + e(v).
    - A code is the e2m1 value nearest to x', x = |w| / S, so the error is at most half the step at
      x + e(x), or x - 6 beyond the last value, and e(x).
    """
    w = (rng.standard_normal((32, 128)) * 1e-3).astype(np.float32).astype(oracle.NUMPY_DTYPE[dtype])
    amax = np.float32(np.abs(w.astype(np.float32)).max())
    words, scales, _ = ops.quantize(oracle.to_mlx(w), mode="nvfp4", global_scale=mx.array(amax))
    q = oracle.Weight(np.array(words), np.array(scales))
    enlarge = oracle.NVFP4_RANGE / float(amax)
    exact = oracle.f64(w).reshape(-1, nv_fmt.group_size) * enlarge
    error = np.abs(oracle.decode(nv_fmt, q, amax).reshape(exact.shape) * enlarge - exact)
    unit, underflow = oracle.ROUNDOFF[dtype] + 4 * 2.0**-24, oracle.UNDERFLOW[dtype] * enlarge

    octets = q.scales.reshape(-1)
    assert ((octets >= 8) & (octets <= 0x7E)).all(), "a scale is subnormal or no positive number"
    scale, wanted = oracle.scale_values(nv_fmt)[octets], np.abs(exact).max(-1) / 6
    off = wanted * unit + underflow
    assert (np.abs(scale - wanted) <= (wanted + off) / 17 + off).all()

    x = np.abs(exact) / scale[:, None]
    off = x * unit + underflow
    limit = np.maximum(fp4_step(x + off), x - 6) + off
    assert (error <= scale[:, None] * limit).all()


def test_known_quality(rng):
    """Relative rms error on N(0, 1), against the values published with the formats (10 % wide)."""
    known = {
        "affine2_g64": 0.394,
        "affine3_g32": 0.171,
        "affine3_g64": 0.190,
        "affine3_g128": 0.207,
        "affine4_g32": 0.081,
        "affine4_g64": 0.091,
        "affine4_g128": 0.100,
        "affine5_g64": 0.044,
        "affine6_g64": 0.0217,
        "affine8_g32": 0.0048,
        "affine8_g64": 0.0054,
        "affine8_g128": 0.0060,
        "mxfp4": 0.115,
        "nvfp4": 0.095,
        "mxfp8": 0.0265,
    }
    w = rng.standard_normal((256, 512)).astype(np.float32)
    for fmt in formats.FORMATS:
        if fmt.name in known:
            g = quantized_groups(fmt, w)
            error = np.sqrt((g.error**2).mean() / (g.x**2).mean())
            assert 0.9 * known[fmt.name] < error < 1.1 * known[fmt.name], (fmt.name, error)
            known.pop(fmt.name)
    assert not known, f"not in the registry: {sorted(known)}"
