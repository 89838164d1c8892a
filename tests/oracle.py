"""The reference of every numeric test: numpy and ml_dtypes, float64, from the packed bits.

Nothing here calls MLX's quantized ops or reads `kernels/formats`; a fault in the shared decode
therefore cannot hide in the reference. A format is anything with `mode`, `bits` and `group_size`.

Layout: a packed row is one little-endian bit stream, element i in bits [i * bits, (i + 1) * bits).
Values: affine s * q + b; mxfp4, mxfp8 2^(s - 127) * element; nvfp4 s * element, times
global_scale / 2688 where the tensor has one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import mlx.core as mx
import numpy as np

E4M3 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
NVFP4_RANGE = 448.0 * 6.0
NUMPY_DTYPE = {
    mx.float32: np.dtype(np.float32),
    mx.float16: np.dtype(np.float16),
    mx.bfloat16: np.dtype(BF16),
    mx.uint32: np.dtype(np.uint32),
    mx.uint8: np.dtype(np.uint8),
    mx.int32: np.dtype(np.int32),
}
MLX_DTYPE = {v: k for k, v in NUMPY_DTYPE.items()}

# Unit roundoff of each dtype, and of a weight that a kernel may round to x's dtype first.
ROUNDOFF = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
# Half the distance between subnormals: what rounding costs near zero.
UNDERFLOW = {mx.float32: 2.0**-150, mx.float16: 2.0**-25, mx.bfloat16: 2.0**-134}


class Weight(NamedTuple):
    """A quantized weight as numpy arrays: words [..., N, K*bits/32], scales [..., N, K/g]."""

    words: np.ndarray
    scales: np.ndarray
    biases: np.ndarray | None = None


# --- arrays in and out of MLX ---------------------------------------------------------------


def to_numpy(a: mx.array) -> np.ndarray:
    """The same bits as a numpy array (bfloat16 through ml_dtypes)."""
    if a.dtype == mx.bfloat16:
        return np.array(a.view(mx.uint16)).view(BF16)
    return np.array(a)


def to_mlx(a: np.ndarray) -> mx.array:
    """The same bits as an MLX array."""
    a = np.array(a, order="C", copy=True)  # also where a size-1 dimension has an odd stride
    if a.dtype == BF16:
        return mx.array(a.view(np.uint16)).view(mx.bfloat16)
    return mx.array(a)


def f64(a: Any) -> np.ndarray:
    """Exact float64 copy of an MLX or numpy array."""
    return (to_numpy(a) if isinstance(a, mx.array) else np.asarray(a)).astype(np.float64)


def rounded(a: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """`a` (float64, exact in float32) rounded once to `dtype`, back in float64."""
    with np.errstate(over="ignore"):
        return a.astype(np.float32).astype(NUMPY_DTYPE[dtype]).astype(np.float64)


def bits_of(a: np.ndarray) -> np.ndarray:
    """The bit patterns of an array, for comparisons in which -0 and NaN count."""
    return np.ascontiguousarray(a).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[a.dtype.itemsize])


# --- packing --------------------------------------------------------------------------------


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 codes [..., K] to uint32 words [..., K * bits / 32]."""
    stream = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")
    stream = stream[..., :bits].reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return np.packbits(stream, axis=-1, bitorder="little").view("<u4")


def unpack(words: np.ndarray, bits: int) -> np.ndarray:
    """uint32 words [..., K * bits / 32] to uint8 codes [..., K]."""
    lead, width = words.shape[:-1], words.shape[-1] * 32
    octets = np.ascontiguousarray(words).astype("<u4").view(np.uint8).reshape(*lead, width // 8)
    stream = np.unpackbits(octets, axis=-1, bitorder="little")
    stream = stream.reshape(*lead, width // bits, bits)
    return (stream << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8)


# --- decode ---------------------------------------------------------------------------------


def element_values(fmt: Any) -> np.ndarray:
    """The value of every code of a floating-point format, before its scale."""
    if fmt.bits == 8:
        return np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float64)
    return E2M1_VALUES


def scale_values(fmt: Any) -> np.ndarray:
    """The value of every scale byte. e8m0 255 is +inf, as in MLX (OCP MX calls it NaN)."""
    octets = np.arange(256, dtype=np.uint8)
    if fmt.mode == "nvfp4":
        return octets.view(E4M3).astype(np.float64)
    values = np.exp2(octets.astype(np.float64) - 127)
    values[255] = np.inf
    return values


def decode(fmt: Any, w: Weight, global_scale: float | None = None) -> np.ndarray:
    """float64 weights [..., N, K]."""
    codes = unpack(w.words, fmt.bits)
    if fmt.mode == "affine":
        scales = np.repeat(f64(w.scales), fmt.group_size, -1)
        return scales * codes + np.repeat(f64(w.biases), fmt.group_size, -1)
    with np.errstate(invalid="ignore"):  # inf * 0 of e8m0 255 is the NaN that is meant
        scales = np.repeat(scale_values(fmt)[w.scales], fmt.group_size, -1)
        values = scales * element_values(fmt)[codes]
    return values if global_scale is None else values * (float(global_scale) / NVFP4_RANGE)


# --- encode, as mx.quantize of MLX 0.32.4 does on the device in use ----------------------------
#
# MLX's kernels for the CPU and for CUDA differ in ties, in what they round on the way and in the
# scale of a zero group. Ours follow each on its device, and so do these functions.


def on_gpu() -> bool:
    """Whether the default device, hence whatever a test runs, is a GPU."""
    return mx.default_device() == mx.gpu


def to_integer(x: np.ndarray) -> np.ndarray:
    """float32 integers; halves go to the even one on the CPU, away from zero on a GPU."""
    if not on_gpu():
        return np.rint(x)
    return np.trunc(x + np.copysign(0.5, x, dtype=np.float64)).astype(np.float32)


def encode_e4m3(x: np.ndarray) -> np.ndarray:
    """e4m3fn bytes: nearest, ties to even, saturating at 448; the sign of zero is kept."""
    x = x.astype(np.float32)
    sign = (x.view(np.uint32) >> 24).astype(np.uint8) & 0x80
    with np.errstate(over="ignore", invalid="ignore"):
        nearest = x.astype(E4M3).view(np.uint8)
    return np.where(np.abs(x) < 448, nearest, sign | 0x7E).astype(np.uint8)


def encode_e2m1(x: np.ndarray) -> np.ndarray:
    """e2m1 codes: the nearest.

    CPU: every tie to the smaller magnitude, -0 and what rounds to it to +0.
    GPU: ties to the even code, the sign kept on zero as well, +6 for NaN.
    """
    thresholds = (E2M1_VALUES[:7] + E2M1_VALUES[1:8]) / 2
    size = np.abs(x.astype(np.float64))[..., None]
    magnitude = (size > thresholds).sum(-1)
    if not on_gpu():
        return (magnitude + np.where((x < 0) & (magnitude > 0), 8, 0)).astype(np.uint8)
    magnitude += (size[..., 0, None] == thresholds[1::2]).any(-1)  # from odd codes: up
    codes = magnitude + np.where(np.signbit(x), 8, 0)
    return np.where(np.isnan(x), 7, codes).astype(np.uint8)


def _encode_affine(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All in float32; the end of larger magnitude is reproduced, zero lies on the grid.

    On a GPU the range reaches up to zero where all of a group is negative.
    """
    x, steps = groups.astype(np.float32), np.float32(2**bits - 1)
    low, high = x.min(-1), x.max(-1)
    high = np.maximum(high, np.float32(0)) if on_gpu() else high
    low_edge = np.abs(low) > np.abs(high)
    scale = np.maximum((high - low) / steps, np.float32(1e-7))
    scale = np.where(low_edge, scale, -scale)
    edge = np.where(low_edge, low, high)
    to_zero = to_integer(edge / scale)
    snapped = to_zero != 0
    scale = np.where(snapped, edge / np.where(snapped, to_zero, 1), scale)
    bias = np.where(snapped, edge, np.float32(0))
    codes = np.clip(to_integer((x - bias[..., None]) / scale[..., None]), 0, steps)
    return codes.astype(np.uint8), scale.astype(groups.dtype), bias.astype(groups.dtype)


def over(amax: np.ndarray, largest: float) -> np.ndarray:
    """amax / largest in the dtype of amax on the CPU, in float32 on a GPU."""
    dtype = np.dtype(np.float32) if on_gpu() else amax.dtype
    return (amax.astype(dtype) / np.array(largest, dtype)).astype(dtype)


def mx_exponent(fmt: Any, amax: np.ndarray) -> np.ndarray:
    """The power of two that scales a group whose largest magnitude is `amax`, in w's dtype.

    It is that of amax / (6 or 448), rounded up. A zero group has 0 on the CPU, -127 on a GPU.
    """
    mantissa, exponent = np.frexp(over(amax, 448.0 if fmt.bits == 8 else 6.0).astype(np.float64))
    zero = -127 if on_gpu() else 0
    return np.where(mantissa == 0, zero, exponent - (mantissa == 0.5)).astype(np.int64)


def _encode_mx(fmt: Any, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Below 2^-127 MLX's CPU code wraps the byte around to 255, infinity; here it stays 0.
    exponent = np.maximum(mx_exponent(fmt, np.abs(groups).max(-1)), -127)
    x = groups.astype(np.float64) * np.exp2(-exponent.astype(np.float64))[..., None]
    codes = encode_e4m3(x) if fmt.bits == 8 else encode_e2m1(x)
    return codes, (exponent + 127).astype(np.uint8)


def _encode_nvfp4(groups: np.ndarray, global_scale: float | None) -> tuple[np.ndarray, np.ndarray]:
    """The CPU rounds both quotients to w's dtype, before the factor of global_scale; a group of
    scale 0 has codes 0. A GPU multiplies by factor / scale in float32, also by infinity.
    """
    dtype = groups.dtype
    factor = np.float32(1)
    if global_scale is not None:
        factor = np.float32(NVFP4_RANGE) / np.float32(global_scale)
    octets = encode_e4m3(over(np.abs(groups).max(-1), 6.0).astype(np.float32) * factor)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if on_gpu():
            inverse = factor / octets.view(E4M3).astype(np.float32)
            return encode_e2m1(groups.astype(np.float32) * inverse[..., None]), octets
        x = (groups / octets.view(E4M3).astype(dtype)[..., None]).astype(dtype)
        codes = encode_e2m1(x.astype(np.float32) * factor)
    return np.where(octets[..., None] == 0, 0, codes).astype(np.uint8), octets


def encode(fmt: Any, w: np.ndarray, global_scale: float | None = None) -> Weight:
    """Quantizes `w` [..., N, K] of float32, float16 or bfloat16; finite input only."""
    groups = w.reshape(*w.shape[:-1], w.shape[-1] // fmt.group_size, fmt.group_size)
    biases = None
    if fmt.mode == "affine":
        codes, scales, biases = _encode_affine(groups, fmt.bits)
    elif fmt.mode == "nvfp4":
        codes, scales = _encode_nvfp4(groups, global_scale)
    else:
        codes, scales = _encode_mx(fmt, groups)
    return Weight(pack(codes.reshape(w.shape), fmt.bits), scales, biases)


# --- products -------------------------------------------------------------------------------


class Product(NamedTuple):
    """A float64 product and what bounds the error of computing it.

    value [..., M, N]; rms = sqrt(x^2 @ W^2), the size the sum has when signs are random;
    worst = |x| @ `weight_magnitude`, the sum of the magnitudes of everything that is added.
    """

    value: np.ndarray
    rms: np.ndarray
    worst: np.ndarray


def matmul(
    x: np.ndarray,
    w: np.ndarray,
    *,
    magnitude: np.ndarray | None = None,
    bias: np.ndarray | None = None,
    transpose: bool = True,
) -> Product:
    """x [..., M, K] @ w [..., N, K]^T (+ bias [N]) in float64, with its error measures."""
    x, w = f64(x), f64(w)
    big = np.abs(w) if magnitude is None else magnitude
    if transpose:
        w, big = np.swapaxes(w, -1, -2), np.swapaxes(big, -1, -2)
    value, worst = x @ w, np.abs(x) @ big
    rms = np.sqrt(x**2 @ w**2)
    if bias is not None:
        b = f64(bias)
        value, worst, rms = value + b, worst + np.abs(b), np.sqrt(rms**2 + b**2)
    return Product(value, rms, worst)


def weight_magnitude(fmt: Any, w: Weight, global_scale: float | None = None) -> np.ndarray:
    """What the terms of a decoded value may reach: |W|, or for affine |s| (2^bits - 1) + |b|.

    A kernel may take s q + b apart, say into s (q - z) + (b + s z), so a small value is rounded as
    its group's whole range is.
    """
    if fmt.mode != "affine":
        return np.abs(decode(fmt, w, global_scale))
    reach = np.abs(f64(w.scales)) * (2**fmt.bits - 1) + np.abs(f64(w.biases))
    return np.repeat(reach, fmt.group_size, -1)


def quantized_matmul(
    fmt: Any,
    x: np.ndarray,
    w: Weight,
    *,
    bias: np.ndarray | None = None,
    transpose: bool = True,
    global_scale: float | None = None,
) -> Product:
    """x @ decode(w)^T, or x @ decode(w) where `transpose` is false."""
    return matmul(
        x,
        decode(fmt, w, global_scale),
        bias=bias,
        transpose=transpose,
        magnitude=weight_magnitude(fmt, w, global_scale),
    )


def qqmm(
    fmt: Any,
    x: np.ndarray,
    w: Weight,
    *,
    bias: np.ndarray | None = None,
    global_scale_x: float | None = None,
    global_scale_w: float | None = None,
) -> Product:
    """decode(encode(x)) @ decode(w)^T."""
    xq = decode(fmt, encode(fmt, x, global_scale_x), global_scale_x)
    return matmul(xq, decode(fmt, w, global_scale_w), bias=bias)


def gather(
    x: np.ndarray,
    w: np.ndarray,
    lhs: np.ndarray,
    rhs: np.ndarray,
    *,
    bias: np.ndarray | None = None,
    transpose: bool = True,
) -> Product:
    """x[lhs] @ w[rhs]^T (+ bias[rhs]) over flat indices of all but the last two dimensions."""
    xs = x.reshape(-1, *x.shape[-2:])[lhs]
    ws = w.reshape(-1, *w.shape[-2:])[rhs]
    b = None if bias is None else bias.reshape(-1, bias.shape[-1])[rhs][..., None, :]
    return matmul(xs, ws, bias=b, transpose=transpose)


# --- tolerance ------------------------------------------------------------------------------


def tolerance(dtype: mx.Dtype, K: int) -> float:
    """Bound on the relative Frobenius error: one rounding, or float32 accumulation over K."""
    if dtype == mx.float32:
        return 1e-6 * (max(K, 2048) / 2048) ** 0.5
    return ROUNDOFF[dtype]


def assert_close(y: mx.array, product: Product, K: int, *, dtype: mx.Dtype | None = None) -> None:
    """Shape, dtype, NaN and infinity positions, norm-wise and element-wise error of `y`.

    The norm is at least that of `product.rms`, so one dot product that happens to cancel does not
    count as an error. Element-wise, the error is at most a rounding of the value, a rounding of
    each weight to 16 bits (matrix units), and K float32 additions.
    """
    dtype = dtype or y.dtype
    assert y.dtype == dtype, f"dtype {y.dtype}, expected {dtype}"
    got, want = f64(y), product.value
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}"
    finite = np.isfinite(want)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg="NaN positions")
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg="infinities")
    if not finite.any():
        return
    error = np.where(finite, np.abs(np.where(finite, got, 0) - np.where(finite, want, 0)), 0)
    assert np.isfinite(error).all(), (
        f"not finite at {np.argwhere(~np.isfinite(error))[:4].tolist()}"
    )
    norm = max(np.linalg.norm(want[finite]), np.linalg.norm(product.rms[finite]))
    # The bound is on a root mean square: fewer than 32 roundings do not average out.
    bound = tolerance(dtype, K) * (1 if error.size >= 32 else 2)
    assert np.linalg.norm(error) <= bound * norm + UNDERFLOW[dtype] * error.size**0.5, (
        f"relative error {np.linalg.norm(error) / norm:.3g} > {bound:.3g}, "
        f"worst at {np.unravel_index(error.argmax(), error.shape)}"
    )
    unit = ROUNDOFF[dtype]
    per_term = (K + 8) * 2.0**-24 + (0 if dtype == mx.float32 else unit)
    limit = unit * np.abs(want) + per_term * product.worst + UNDERFLOW[dtype]
    over = finite & (error > limit)
    if over.any():
        at = tuple(np.argwhere(over)[0])
        raise AssertionError(
            f"element {at}: {got[at]!r}, expected {want[at]!r} +- {limit[at]:.3g}; "
            f"{over.sum()} of {over.size} elements are out"
        )


def assert_equal(y: mx.array, want: np.ndarray) -> None:
    """Equality with `want` (exact in float32) rounded once to y's dtype; NaN equals NaN."""
    np.testing.assert_array_equal(f64(y), rounded(want, y.dtype))
