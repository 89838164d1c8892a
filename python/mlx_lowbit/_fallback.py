"""The same operations on MLX's own ops, for devices and formats without a kernel of ours.

MLX's ops take some bad arguments without a word (scales with too few rows are read out of bounds)
and die of some empty ones (a division by zero), so both are settled here first.
"""

from __future__ import annotations

import math

import mlx.core as mx

from .formats import Format, get

# The factor of nvfp4's global scale is the scale over 448 * 6.
_GLOBAL_MAX = 2688.0


def _widths(mode: str, bits: int | None, group_size: int | None) -> tuple[int, int]:
    """Bits and group size, for MLX's one-bit format as well."""
    shape = get(mode, None if mode == "affine" else bits, group_size)
    return (shape.bits if bits is None else bits), shape.group_size


def _check(op, x, w, scales, biases, mode, bits, group_size, transpose) -> tuple[int, int]:
    """(K, N) of a product, or ValueError naming the argument, what was expected and got."""

    def refuse(text: str):
        raise ValueError(f"[{op}] {text}")

    bits, group_size = _widths(mode, bits, group_size)
    if w.dtype != mx.uint32 or w.ndim < 2:
        refuse(f"w must be uint32 with at least 2 dimensions, got {w.dtype} of shape {w.shape}")
    columns = w.shape[-1] * 32 // bits
    if w.shape[-1] * 32 % (bits * group_size):
        refuse(f"w of shape {w.shape} does not hold whole groups of {group_size} {bits}-bit codes")
    expected = (*w.shape[:-1], columns // group_size)
    for name, value in (("scales", scales), ("biases", biases)):
        if (mode == "affine" or name == "scales") and value is None:
            refuse(f"{name} are required in mode {mode}, got None")
        if value is not None and value.shape != expected:
            refuse(f"{name} must have shape {expected} for w of shape {w.shape}, got {value.shape}")
    K, N = (columns, w.shape[-2]) if transpose else (w.shape[-2], columns)
    if x is not None:
        if not mx.issubdtype(x.dtype, mx.floating):
            refuse(f"x must be float32, float16 or bfloat16, got {x.dtype}")
        if x.ndim < 1 or x.shape[-1] != K:
            refuse(f"the last dimension of x must be {K} to match w, got x of shape {x.shape}")
    return K, N


def _result_dtype(x, scales, biases) -> mx.Dtype:
    if biases is None:
        return x.dtype
    return mx.result_type(x, scales, biases)


def add_bias(y: mx.array, bias: mx.array | None, stream) -> mx.array:
    return y if bias is None else mx.add(y, bias, stream=stream).astype(y.dtype)


def _scaled(y, global_scale, rhs_indices, stream) -> mx.array:
    """MLX's products have no global scale (or lose it): its factor enters here."""
    if global_scale is None:
        return y
    factor = global_scale / _GLOBAL_MAX
    if factor.size > 1:
        factor = mx.expand_dims(mx.take(factor.reshape(-1), rhs_indices, stream=stream), (-1, -2))
    return mx.multiply(y.astype(mx.float32), factor, stream=stream).astype(y.dtype)


def quantize(w, mode, bits, group_size, global_scale, nan_policy, stream):
    bits, group_size = _widths(mode, bits, group_size)
    if w.ndim < 2 or w.shape[-1] % group_size:
        raise ValueError(
            f"[quantize] w must have at least 2 dimensions, the last a multiple of {group_size}, "
            f"got shape {w.shape}"
        )
    if nan_policy == "raise" and w.size and not mx.all(mx.isfinite(w)).item():
        raise ValueError("[quantize] w must be finite; nan_policy='propagate' accepts it as it is")
    if w.size == 0:
        groups = (*w.shape[:-1], w.shape[-1] // group_size)
        codes = mx.zeros((*w.shape[:-1], w.shape[-1] * bits // 32), mx.uint32)
        if mode == "affine":
            return codes, mx.zeros(groups, w.dtype), mx.zeros(groups, w.dtype)
        return codes, mx.zeros(groups, mx.uint8), None
    scale = {} if global_scale is None else {"global_scale": global_scale}
    parts = mx.quantize(w, group_size=group_size, bits=bits, mode=mode, **scale, stream=stream)
    return (*parts, None) if len(parts) == 2 else tuple(parts)


def dequantize(w, scales, biases, mode, bits, group_size, global_scale, dtype, stream):
    K, _ = _check("dequantize", None, w, scales, biases, mode, bits, group_size, True)
    dtype = dtype or (scales.dtype if mode == "affine" else mx.bfloat16)
    if w.size == 0:
        return mx.zeros((*w.shape[:-1], K), dtype)
    bits, group_size = _widths(mode, bits, group_size)
    scale = {} if global_scale is None else {"global_scale": global_scale}
    return mx.dequantize(
        w, scales, biases, group_size=group_size, bits=bits, mode=mode, dtype=dtype, **scale,
        stream=stream,
    ).astype(dtype)  # fmt: skip


def quantized_matmul(
    x, w, scales, biases, bias, transpose, mode, bits, group_size, global_scale, stream
):
    _, N = _check("quantized_matmul", x, w, scales, biases, mode, bits, group_size, transpose)
    if x.size == 0 or w.size == 0:
        batch = x.shape[:-1]
        if w.ndim > 2:
            batch = (*mx.broadcast_shapes(x.shape[:-2], w.shape[:-2]), *x.shape[-2:-1])
        y = mx.zeros((*batch, N), _result_dtype(x, scales, biases))
        return add_bias(y, bias, stream)
    bits, group_size = _widths(mode, bits, group_size)
    y = mx.quantized_matmul(
        x, w, scales, biases, transpose=transpose, group_size=group_size, bits=bits, mode=mode,
        stream=stream,
    )  # fmt: skip
    return add_bias(_scaled(y, global_scale, None, stream), bias, stream)


def qqmm(x, w, scales, bias, fmt: Format, global_scale_x, global_scale_w, stream):
    _, N = _check("qqmm", x, w, scales, None, fmt.mode, fmt.bits, fmt.group_size, True)
    if x.size == 0 or w.size == 0:
        return add_bias(mx.zeros((*x.shape[:-1], N), x.dtype), bias, stream)
    scale = {}
    if global_scale_x is not None:
        scale = {"global_scale_x": global_scale_x, "global_scale_w": global_scale_w}
    y = mx.qqmm(
        x, w, scales, group_size=fmt.group_size, bits=fmt.bits, mode=fmt.mode, **scale,
        stream=stream,
    )  # fmt: skip
    return add_bias(y, bias, stream)


def _expert_bias(y, bias, rhs_indices, stream):
    if bias is None:
        return y
    flat = bias.reshape(-1, bias.shape[-1])
    chosen = flat if rhs_indices is None else mx.take(flat, rhs_indices, axis=0, stream=stream)
    return add_bias(y, mx.expand_dims(chosen, -2), stream)


def _indices(given, leading) -> mx.array:
    return mx.arange(math.prod(leading)).reshape(leading) if given is None else given


def gather_qmm(
    x, w, scales, biases, lhs_indices, rhs_indices, bias, transpose, sorted_indices,
    mode, bits, group_size, global_scale, stream,
):  # fmt: skip
    _, N = _check("gather_qmm", x, w, scales, biases, mode, bits, group_size, transpose)
    bits, group_size = _widths(mode, bits, group_size)
    rhs = _indices(rhs_indices, w.shape[:-2])
    if x.size == 0 or w.size == 0:
        pairs = mx.broadcast_shapes(_indices(lhs_indices, x.shape[:-2]).shape, rhs.shape)
        y = mx.zeros((*pairs, x.shape[-2], N), _result_dtype(x, scales, biases))
        return _expert_bias(y, bias, rhs, stream)
    y = mx.gather_qmm(
        x, w, scales, biases, lhs_indices=lhs_indices, rhs_indices=rhs_indices,
        transpose=transpose, group_size=group_size, bits=bits, mode=mode,
        sorted_indices=sorted_indices, stream=stream,
    )  # fmt: skip
    return _expert_bias(_scaled(y, global_scale, rhs, stream), bias, rhs, stream)


def gather_qqmm(
    x, w, scales, lhs_indices, rhs_indices, bias, sorted_indices, fmt: Format,
    global_scale_x, global_scale_w, stream,
):  # fmt: skip
    _check("gather_qqmm", x, w, scales, None, fmt.mode, fmt.bits, fmt.group_size, True)
    if global_scale_x is not None:
        raise ValueError("[gather_qqmm] global scales need a kernel of mlx_lowbit on this device")
    rhs = _indices(rhs_indices, w.shape[:-2])
    y = mx.gather_qqmm(
        x, w, scales, lhs_indices=lhs_indices, rhs_indices=rhs_indices, group_size=fmt.group_size,
        bits=fmt.bits, mode=fmt.mode, sorted_indices=sorted_indices, stream=stream,
    )  # fmt: skip
    return _expert_bias(y, bias, rhs, stream)
