"""The same operations on MLX's own ops, for devices and formats without a kernel of ours."""

from __future__ import annotations

import mlx.core as mx

from .formats import Format


def add_bias(y: mx.array, bias: mx.array | None, stream) -> mx.array:
    return y if bias is None else mx.add(y, bias, stream=stream).astype(y.dtype)


def _scaled(y: mx.array, global_scale: mx.array | None, stream) -> mx.array:
    """MLX's product has no global scale: its factor (amax over 448 * 6) enters here."""
    if global_scale is None:
        return y
    return mx.multiply(y, global_scale / 2688.0, stream=stream).astype(y.dtype)


def quantize(w, mode, bits, group_size, global_scale, stream):
    parts = mx.quantize(
        w,
        group_size=group_size,
        bits=bits,
        mode=mode,
        **({} if global_scale is None else {"global_scale": global_scale}),
        stream=stream,
    )
    return (*parts, None) if len(parts) == 2 else tuple(parts)


def dequantize(w, scales, biases, mode, bits, group_size, global_scale, dtype, stream):
    return mx.dequantize(
        w,
        scales,
        biases,
        group_size=group_size,
        bits=bits,
        mode=mode,
        dtype=dtype,
        **({} if global_scale is None else {"global_scale": global_scale}),
        stream=stream,
    )


def quantized_matmul(
    x, w, scales, biases, bias, transpose, mode, bits, group_size, global_scale, stream
):
    y = mx.quantized_matmul(
        x,
        w,
        scales,
        biases,
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        mode=mode,
        stream=stream,
    )
    return add_bias(_scaled(y, global_scale, stream), bias, stream)


def qqmm(x, w, scales, bias, fmt: Format, global_scale_x, global_scale_w, stream):
    scale = {}
    if global_scale_x is not None:
        scale = {"global_scale_x": global_scale_x, "global_scale_w": global_scale_w}
    y = mx.qqmm(
        x,
        w,
        scales,
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
        **scale,
        stream=stream,
    )
    return add_bias(y, bias, stream)


def _expert_bias(y, bias, rhs_indices, stream):
    if bias is None:
        return y
    flat = bias.reshape(-1, bias.shape[-1])
    chosen = flat if rhs_indices is None else mx.take(flat, rhs_indices, axis=0, stream=stream)
    return add_bias(y, mx.expand_dims(chosen, -2), stream)


def gather_qmm(
    x, w, scales, biases, lhs_indices, rhs_indices, bias, transpose, sorted_indices,
    mode, bits, group_size, global_scale, stream,
):  # fmt: skip
    y = mx.gather_qmm(
        x,
        w,
        scales,
        biases,
        lhs_indices=lhs_indices,
        rhs_indices=rhs_indices,
        transpose=transpose,
        group_size=group_size,
        bits=bits,
        mode=mode,
        sorted_indices=sorted_indices,
        stream=stream,
    )
    return _expert_bias(_scaled(y, global_scale, stream), bias, rhs_indices, stream)


def gather_qqmm(x, w, scales, lhs_indices, rhs_indices, bias, sorted_indices, fmt: Format, stream):
    y = mx.gather_qqmm(
        x,
        w,
        scales,
        lhs_indices=lhs_indices,
        rhs_indices=rhs_indices,
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
        sorted_indices=sorted_indices,
        stream=stream,
    )
    return _expert_bias(y, bias, rhs_indices, stream)
