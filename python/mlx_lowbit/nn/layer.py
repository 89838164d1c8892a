"""What every layer of this package shares: its mark, its operands, its checks."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as mlx_nn

from .. import formats, ops
from ..ops import ACTIVATION_MODES

ORIGIN = "_class_before_accelerate"
"""Plain attribute, never a parameter: the class which ``undo`` puts back."""

SEAT = "_seat"
"""Plain attribute, never a parameter: the place of a layer in a merged product, or None."""

FLOATS = (mx.float32, mx.float16, mx.bfloat16)


class LowbitLayer:
    """Marks a layer whose product runs through :mod:`mlx_lowbit.ops`.

    It has no state, so that ``__class__`` may be changed between MLX's layers and ours in place.
    """

    __slots__ = ()


Layer = TypeVar("Layer", bound=mlx_nn.Module)


def empty(cls: type[Layer]) -> Layer:
    """A layer of class ``cls`` without parameters, which its maker assigns next."""
    layer = cls.__new__(cls)
    mlx_nn.Module.__init__(layer)
    return layer


def share(cls: type[Layer], source: mlx_nn.Module) -> Layer:
    """A new layer of class ``cls`` which holds the same arrays and settings as ``source``."""
    layer = empty(cls)
    dict.update(layer, source)
    vars(layer).update(vars(source))
    vars(layer)["_no_grad"] = set(source._no_grad)
    vars(layer).pop(ORIGIN, None)
    vars(layer).pop(SEAT, None)
    return layer


def quantization(layer: mlx_nn.Module) -> dict[str, Any]:
    """The keywords which tell an op how ``layer`` stores its weight."""
    return {"mode": layer.mode, "bits": layer.bits, "group_size": layer.group_size}


def stored_global_scale(layer: mlx_nn.Module) -> mx.array | None:
    """The float32 ``global_scale`` of ``layer``, or None.

    ``Module.set_dtype`` casts it along with the other parameters, hence the cast back.
    """
    value = layer.get("global_scale")
    return None if value is None else value.astype(mx.float32)


def check_source(argument: str, layer: Any, expected: str, ndim: int) -> mx.array:
    """The float weight of ``layer``, which must have ``ndim`` dimensions.

    Raises:
        TypeError: naming ``argument``, what was ``expected`` and what came.
    """
    weight = layer.get("weight") if isinstance(layer, mlx_nn.Module) else None
    if not isinstance(weight, mx.array) or weight.ndim != ndim or weight.dtype not in FLOATS:
        held = f" with weight {weight.shape} {weight.dtype}" if isinstance(weight, mx.array) else ""
        raise TypeError(f"{argument}: expected {expected}, got {type(layer).__name__}{held}")
    return weight


def check_quantized(argument: str, layer: Any, expected: str, ndim: int) -> None:
    """Refuse a ``layer`` which does not hold ``ndim``-dimensional packed codes and their scales.

    Raises:
        TypeError: naming ``argument``, what was ``expected`` and what came.
    """
    settings = all(hasattr(layer, name) for name in ("mode", "bits", "group_size"))
    weight = layer.get("weight") if isinstance(layer, mlx_nn.Module) and settings else None
    packed = isinstance(weight, mx.array) and weight.dtype == mx.uint32 and weight.ndim == ndim
    if not packed or layer.get("scales") is None:
        raise TypeError(f"{argument}: expected {expected}, got {type(layer).__name__}")


def check_activation_mode(owner: str, mode: str) -> None:
    """Refuse a ``mode`` in which activations cannot be quantized.

    Raises:
        ValueError: naming ``owner``, its mode and the modes that work.
    """
    if mode not in ACTIVATION_MODES:
        raise ValueError(
            f"mode: {owner} is in mode {mode!r}; activations can be quantized in "
            f"{' and '.join(map(repr, ACTIVATION_MODES))} only"
        )


def store_quantized(
    layer: mlx_nn.Module,
    weight: mx.array,
    *,
    group_size: int | None,
    bits: int | None,
    mode: str,
    global_scale: bool,
    nan_policy: str,
) -> None:
    """Quantize ``weight`` [..., N, K] into ``layer`` and set what describes it.

    With ``global_scale`` the largest magnitude of the matrix (of each one of a stack [E, N, K]) is
    stored as well.

    Raises:
        ValueError: an unknown format, ``global_scale`` outside nvfp4, or what ``ops.quantize``
            refuses.
    """
    fmt = formats.get(mode=mode, bits=bits, group_size=group_size)
    layer.mode, layer.bits, layer.group_size = fmt.mode, fmt.bits, fmt.group_size
    keywords = dict(quantization(layer), nan_policy=nan_policy)
    if not global_scale:
        layer.weight, layer.scales, layer.biases = ops.quantize(weight, **keywords)
        return
    if mode != "nvfp4":
        raise ValueError(f"global_scale: only mode 'nvfp4' has one, got True in mode {mode!r}")
    layer.global_scale = mx.abs(weight).max(axis=(-2, -1)).astype(mx.float32)
    if weight.ndim == 2:
        layer.weight, layer.scales, layer.biases = ops.quantize(
            weight, global_scale=layer.global_scale, **keywords
        )
        return
    parts = [
        ops.quantize(matrix, global_scale=scale, **keywords)
        for matrix, scale in zip(weight, layer.global_scale, strict=True)
    ]
    layer.weight, layer.scales = (mx.stack(column) for column in list(zip(*parts, strict=True))[:2])
    layer.biases = None


def store_random(
    layer: mlx_nn.Module, shape: tuple[int, ...], *, bias: bool, **storage: Any
) -> None:
    """Make ``layer`` what MLX's constructors make of one: random weight, zero bias, frozen.

    Args:
        shape: of the weight before it is quantized, [..., N, K].
        storage: the keywords of :func:`store_quantized`, which says what is raised.
    """
    mlx_nn.Module.__init__(layer)
    bound = math.sqrt(1 / shape[-1])
    weight = mx.random.uniform(low=-bound, high=bound, shape=shape)
    store_quantized(layer, weight, nan_policy="propagate", **storage)
    if bias:
        layer.bias = mx.zeros(shape[:-1])
    layer.freeze()


def quantized_from(
    cls: type[Layer],
    source: mlx_nn.Module,
    weight: mx.array,
    *,
    bias: mx.array | None = None,
    **storage: Any,
) -> Layer:
    """A frozen layer of class ``cls`` which stores ``weight`` [..., N, K] of ``source`` quantized.

    Args:
        bias: shared, not copied, and trainable, as in MLX.
        storage: the keywords of :func:`store_quantized`, which says what is raised.
    """
    layer = empty(cls)
    store_quantized(layer, weight, **storage)
    layer.freeze()
    if bias is not None:
        layer.bias = bias
    layer.train(source.training)
    return layer
