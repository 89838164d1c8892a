"""The operations, with MLX's names, argument order and result dtypes.

Products accumulate in float32 and are rounded once to the result's dtype. Everything that shapes,
dtypes and arguments can tell is refused when the function is called; a case without a kernel of
ours runs MLX's op (:mod:`mlx_lowbit.backend`).
"""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from . import _ext, _fallback, _load
from .backend import compiled_where_it_runs, get_backend, reason_for_mlx
from .formats import Format, MissingFormatError, get

__all__ = [
    "dequantize",
    "explain",
    "gather_qmm",
    "gather_qqmm",
    "linear",
    "qqmm",
    "quantize",
    "quantized_matmul",
]

StreamOrDevice = mx.Stream | mx.Device | mx.DeviceType | None
ACTIVATION_MODES = ("mxfp8", "nvfp4")


def _choose(
    op: str,
    mode: str,
    bits: int | None,
    group_size: int | None,
    stream: StreamOrDevice,
    x: mx.array | None = None,
    w: mx.array | None = None,
) -> tuple[Format | None, str | None]:
    """(format, None) for a kernel of ours, (format or None, reason) for MLX's op.

    `x` and `w` are those of a product.
    """
    try:
        found, missing = get(mode, bits, group_size), None
    except MissingFormatError as error:
        found, missing = None, str(error)
    except ValueError as error:
        raise ValueError(f"[{op}] {error}") from None
    return found, reason_for_mlx(op, stream, missing, found, x, w)


def _activation_format(op: str, mode: str, bits: int | None, group_size: int | None) -> Format:
    if mode not in ACTIVATION_MODES:
        raise ValueError(
            f"[{op}] mode {mode!r} has no quantized activations: mode must be "
            f"{' or '.join(repr(m) for m in ACTIVATION_MODES)}"
        )
    try:
        return get(mode, bits, group_size)
    except ValueError as error:
        raise ValueError(f"[{op}] {error}") from None


def _both_or_neither(op: str, x: mx.array | None, w: mx.array | None) -> None:
    if (x is None) != (w is None):
        given, missing = ("x", "w") if w is None else ("w", "x")
        raise ValueError(
            f"[{op}] global_scale_x and global_scale_w come together: "
            f"global_scale_{given} was given, global_scale_{missing} is None"
        )


def _refuse_nonfinite(w: mx.array, scales: mx.array, fmt: Format) -> None:
    """Raises if a group of `w` was NaN or infinite, as its scale tells."""
    marked = mx.isnan(scales) if fmt.has_biases else scales == fmt.nan_scale
    if w.size == 0 or not mx.any(marked).item():
        return
    flat = int(mx.argmin(mx.isfinite(w).reshape(-1)).item())
    index: list[int] = []
    for size in reversed(w.shape):
        flat, at = divmod(flat, size)
        index.insert(0, at)
    value = w[tuple(index)].item()
    if mx.isfinite(mx.array(value)).item():
        return  # finite, but its group's range is not: (highest - lowest) overflows
    raise ValueError(
        f"[quantize] w must be finite, got {value} first at index {tuple(index)}; "
        "nan_policy='propagate' makes such groups NaN instead"
    )


@compiled_where_it_runs
def quantize(
    w: mx.array,
    *,
    mode: str = "affine",
    bits: int | None = None,
    group_size: int | None = None,
    global_scale: mx.array | None = None,
    nan_policy: Literal["raise", "propagate"] = "raise",
    stream: StreamOrDevice = None,
) -> tuple[mx.array, mx.array, mx.array | None]:
    """Quantizes `w` along its last axis, bit for bit as ``mx.quantize``.

    Args:
        w: [..., K] float32, float16 or bfloat16, at least two dimensions.
        mode, bits, group_size: the format; None means the mode's default. K must be a multiple of
            the group size.
        global_scale: one float32 value, the largest magnitude of the tensor; mode nvfp4 only.
        nan_policy: ``raise`` evaluates `w` and refuses NaN and infinity, naming the first index;
            ``propagate`` stays lazy and makes each group that holds one NaN throughout.

    Returns:
        Codes, uint32 [..., K * bits / 32]; scales [..., K / group_size] in the dtype of `w`
        (uint8 in the block modes); biases like scales in mode affine, else None.

    Raises:
        ValueError: an argument that does not fit, named with what was expected and got.
    """
    if nan_policy not in ("raise", "propagate"):
        raise ValueError(
            f"[quantize] nan_policy must be 'raise' or 'propagate', got {nan_policy!r}"
        )
    fmt, reason = _choose("quantize", mode, bits, group_size, stream)
    if reason is not None:
        return _fallback.quantize(w, mode, bits, group_size, global_scale, nan_policy, stream)
    parts = _ext.quantize(w, fmt.id, global_scale, stream)
    if nan_policy == "raise":
        _refuse_nonfinite(w, parts[1], fmt)
    return parts


@compiled_where_it_runs
def dequantize(
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    mode: str = "affine",
    bits: int | None = None,
    group_size: int | None = None,
    global_scale: mx.array | None = None,
    dtype: mx.Dtype | None = None,
    stream: StreamOrDevice = None,
) -> mx.array:
    """The values that codes stand for, computed in float32 and rounded once.

    Args:
        w: codes, uint32 [..., K * bits / 32].
        scales: [..., K / group_size]; floating in mode affine, uint8 in the block modes.
        biases: like `scales` in mode affine, else None.
        global_scale: as given to :func:`quantize`.
        dtype: float32, float16 or bfloat16; None means the dtype of the scales in mode affine and
            bfloat16 in the block modes.

    Returns:
        [..., K] in `dtype`.

    Raises:
        ValueError: an argument that does not fit, named with what was expected and got.
    """
    fmt, reason = _choose("dequantize", mode, bits, group_size, stream)
    if reason is not None:
        return _fallback.dequantize(
            w, scales, biases, mode, bits, group_size, global_scale, dtype, stream
        )
    return _ext.dequantize(w, scales, biases, fmt.id, global_scale, dtype, stream)


@compiled_where_it_runs
def quantized_matmul(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    bias: mx.array | None = None,
    transpose: bool = True,
    mode: str = "affine",
    bits: int | None = None,
    group_size: int | None = None,
    global_scale: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> mx.array:
    """``x @ dequantize(w).T + bias`` without ever storing the dequantized weights.

    Args:
        x: [..., K] float32, float16 or bfloat16.
        w: codes, uint32 [N, K * bits / 32]; with more dimensions the leading ones broadcast
            against those of `x`. ``transpose=False``: [K, N * bits / 32].
        scales, biases: of `w`, as :func:`quantize` gives them.
        bias: [N], added before the one rounding.
        mode, bits, group_size: the format of `w`; None means the mode's default.
        global_scale: nvfp4's, applied to the sum.

    Returns:
        [..., N]: in the common dtype of `x`, `scales` and `biases` (mode affine) or of `x`.

    Raises:
        ValueError: an argument that does not fit, named with what was expected and got.
    """
    fmt, reason = _choose("quantized_matmul", mode, bits, group_size, stream, x, w)
    if reason is not None:
        return _fallback.quantized_matmul(
            x, w, scales, biases, bias, transpose, mode, bits, group_size, global_scale, stream
        )
    return _ext.quantized_matmul(
        x, w, scales, biases, bias, transpose, fmt.id, global_scale, stream
    )


@compiled_where_it_runs
def qqmm(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    *,
    bias: mx.array | None = None,
    mode: str,
    bits: int | None = None,
    group_size: int | None = None,
    global_scale_x: mx.array | None = None,
    global_scale_w: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> mx.array:
    """``Q(x) @ dequantize(w).T + bias``: both sides quantized, in the same format.

    Q quantizes along K exactly as :func:`quantize` does and its values enter the product exactly.
    Derivatives with respect to `x` pass straight through Q.

    Args:
        x: [..., K] float32, float16 or bfloat16.
        w: codes, uint32 [N, K * bits / 32], or with leading dimensions as in
            :func:`quantized_matmul`.
        scales: uint8 [N, K / group_size].
        bias: [N].
        mode: ``mxfp8`` or ``nvfp4``.
        global_scale_x, global_scale_w: one float32 value each (nvfp4), applied to the sum.

    Returns:
        [..., N] in the dtype of `x`.

    Raises:
        ValueError: any other mode, or an argument that does not fit.
    """
    fmt = _activation_format("qqmm", mode, bits, group_size)
    _both_or_neither("qqmm", global_scale_x, global_scale_w)
    if reason_for_mlx("qqmm", stream, None, fmt, x, w) is not None:
        return _fallback.qqmm(x, w, scales, bias, fmt, global_scale_x, global_scale_w, stream)
    return _ext.qqmm(x, w, scales, bias, fmt.id, global_scale_x, global_scale_w, stream)


@compiled_where_it_runs
def gather_qmm(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    biases: mx.array | None = None,
    *,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    bias: mx.array | None = None,
    transpose: bool = True,
    sorted_indices: bool = False,
    mode: str = "affine",
    bits: int | None = None,
    group_size: int | None = None,
    global_scale: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> mx.array:
    """Products of chosen matrices of `x` with chosen matrices of `w`: mixtures of experts.

    Args:
        x: [..., M, K]; w: codes [..., N, K * bits / 32], with scales and biases.
        lhs_indices, rhs_indices: integers into the flattened leading dimensions of `x` and `w`,
            broadcast against each other; None means all of them in order.
        bias: [experts..., N], chosen by `rhs_indices`.
        sorted_indices: a promise that `rhs_indices` ascend; the result does not depend on it.
        transpose, mode, bits, group_size, global_scale: as in :func:`quantized_matmul`.

    Returns:
        [indices..., M, N]. A pair whose index is out of range gives NaN and reads nothing.

    Raises:
        ValueError: an argument that does not fit; with MLX_LOWBIT_CHECK=1 also an index out of
            range (evaluates the indices).
    """
    fmt, reason = _choose("gather_qmm", mode, bits, group_size, stream, x, w)
    if reason is not None:
        return _fallback.gather_qmm(
            x, w, scales, biases, lhs_indices, rhs_indices, bias, transpose, sorted_indices,
            mode, bits, group_size, global_scale, stream,
        )  # fmt: skip
    return _ext.gather_qmm(
        x, w, scales, biases, lhs_indices, rhs_indices, bias, transpose, False, fmt.id,
        None, global_scale, stream,
    )  # fmt: skip


@compiled_where_it_runs
def gather_qqmm(
    x: mx.array,
    w: mx.array,
    scales: mx.array,
    *,
    lhs_indices: mx.array | None = None,
    rhs_indices: mx.array | None = None,
    bias: mx.array | None = None,
    sorted_indices: bool = False,
    mode: str,
    bits: int | None = None,
    group_size: int | None = None,
    global_scale_x: mx.array | None = None,
    global_scale_w: mx.array | None = None,
    stream: StreamOrDevice = None,
) -> mx.array:
    """:func:`gather_qmm` with `x` quantized in the format of `w`, as in :func:`qqmm`.

    Args:
        x: [..., M, K] float32, float16 or bfloat16; w: codes [..., N, K * bits / 32]; scales uint8.
        lhs_indices, rhs_indices, bias, sorted_indices: as in :func:`gather_qmm`.
        mode: ``mxfp8`` or ``nvfp4``.
        global_scale_x, global_scale_w: one float32 value each (nvfp4), applied to the sum.

    Returns:
        [indices..., M, N] in the dtype of `x`.

    Raises:
        ValueError: any other mode, or an argument that does not fit.
    """
    fmt = _activation_format("gather_qqmm", mode, bits, group_size)
    _both_or_neither("gather_qqmm", global_scale_x, global_scale_w)
    if reason_for_mlx("gather_qqmm", stream, None, fmt, x, w) is not None:
        return _fallback.gather_qqmm(
            x, w, scales, lhs_indices, rhs_indices, bias, sorted_indices, fmt,
            global_scale_x, global_scale_w, stream,
        )  # fmt: skip
    return _ext.gather_qmm(
        x, w, scales, None, lhs_indices, rhs_indices, bias, True, True, fmt.id,
        global_scale_x, global_scale_w, stream,
    )  # fmt: skip


def linear(
    x: mx.array, w: mx.array, *, bias: mx.array | None = None, stream: StreamOrDevice = None
) -> mx.array:
    """``x @ w.T + bias`` for dense weights, accumulated in float32.

    On a GPU this is MLX's own product (cuBLAS), which rounds float32 operands to TF32 unless
    MLX_ENABLE_TF32=0.

    Args:
        x: [..., K]; w: [N, K]; bias: [N]; float32, float16 or bfloat16 each.

    Returns:
        [..., N] in the common dtype of `x` and `w`.

    Raises:
        ValueError: an argument that does not fit, named with what was expected and got.
    """
    if get_backend() == "mlx" or _load.missing_extension is not None:
        return _fallback.add_bias(mx.matmul(x, w.T, stream=stream), bias, stream)
    return _ext.linear(x, w, bias, stream)


def explain(
    x: mx.array,
    w: mx.array,
    scales: mx.array | None = None,
    biases: mx.array | None = None,
    *,
    transpose: bool = True,
    quantize_activations: bool = False,
    mode: str = "affine",
    bits: int | None = None,
    group_size: int | None = None,
    stream: StreamOrDevice = None,
) -> str:
    """The plan that a product would run, in words; runs nothing.

    Args:
        x: [..., K] activations; w: codes with `scales` and `biases`, or dense weights without.
        quantize_activations: the plan of :func:`qqmm` instead of :func:`quantized_matmul`.
        transpose, mode, bits, group_size: as in :func:`quantized_matmul`.

    Returns:
        One line such as ``cpu/matvec [avx512bf16]: bfloat16 pairs, float32 sums, ...``, or
        ``MLX's op: ...`` with the reason.

    Raises:
        ValueError: as the product would.
    """
    if scales is None:
        dense = len(_ext.formats())
        return _ext.explain(x, w, None, None, True, False, dense, stream)
    op = "qqmm" if quantize_activations else "quantized_matmul"
    fmt, reason = _choose(op, mode, bits, group_size, stream, x, w)
    if reason is not None:
        return f"MLX's op: {reason} (backend {get_backend()})"
    if quantize_activations:
        _activation_format("explain", mode, bits, group_size)
    return _ext.explain(x, w, scales, biases, transpose, quantize_activations, fmt.id, stream)
