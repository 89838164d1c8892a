"""Linear layers which quantize their input as well as their weight."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as mlx_nn

from .. import ops
from .layer import (
    LowbitLayer,
    check_activation_mode,
    check_quantized,
    check_source,
    quantization,
    quantized_from,
    share,
    store_random,
    stored_global_scale,
)

# e4m3's largest value times e2m1's: the global scale whose factor is one, so that x is quantized
# group by group and a row's result does not depend on the other rows of its batch.
_UNIT_GLOBAL_SCALE = 448.0 * 6.0


def global_scales(of_w: mx.array | None) -> dict[str, mx.array | None]:
    """The two ``global_scale`` keywords of the activation-quantized ops: both, or neither."""
    of_x = None if of_w is None else mx.array(_UNIT_GLOBAL_SCALE, mx.float32)
    return {"global_scale_x": of_x, "global_scale_w": of_w}


class QQLinear(LowbitLayer, mlx_nn.QQLinear, mlx_nn.QuantizedLinear):
    """``y = Q(x) @ decode(weight).T + bias`` in mxfp8 or nvfp4, Q(x) as ``mx.quantize`` defines it.

    What differs from ``mlx.nn.QQLinear``:

    - it takes a ``bias``;
    - the weight is quantized from the start and stays so: ``train()`` and ``eval()`` change only
      the flag, where MLX's layer replaces its weight by rounded floats on ``train()``;
    - its storage is exactly that of :class:`QuantizedLinear` (names, dtypes, frozen parameters,
      optional ``global_scale``), so it is an instance of ``mlx.nn.QuantizedLinear`` too, and what
      reads that storage (LoRA, ``mlx_lm.fuse``, ``mlx_lm.utils.dequantize_model``) serves it.

    Args:
        input_dims, output_dims (int): the dimensions of x and y.
        group_size, bits (int, optional): default to the mode's.
        mode (str): ``"mxfp8"`` or ``"nvfp4"`` (the default, as in MLX).
        bias (bool): with a ``bias`` of zeros. Default: ``False``.

    Raises:
        ValueError: any other mode, named together with the two that work.
    """

    # What tools written for MLX's two classes read: neither mode has biases, and the weight is
    # always in its quantized form.
    biases = None
    _quantized = True

    _seat = None

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "nvfp4",
        *,
        bias: bool = False,
    ) -> None:
        check_activation_mode(type(self).__name__, mode)
        store_random(
            self,
            (output_dims, input_dims),
            bias=bias,
            group_size=group_size,
            bits=bits,
            mode=mode,
            global_scale=False,
        )

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., input_dims] -> [..., output_dims]: :func:`mlx_lowbit.qqmm`."""
        if self._seat is not None and (part := self._seat.product(self, x)) is not None:
            return part
        return ops.qqmm(
            x,
            self["weight"],
            self["scales"],
            bias=self.get("bias"),
            **global_scales(stored_global_scale(self)),
            **quantization(self),
        )

    def _extra_repr(self) -> str:
        return mlx_nn.QuantizedLinear._extra_repr(self)

    def _set_training_mode(self, mode: bool) -> None:
        mlx_nn.Module._set_training_mode(self, mode)

    def quantize(self) -> None:
        """Nothing to do: the weight of this layer is always quantized."""

    def dequantize(self) -> None:
        """Refused, because rounded floats in place of the codes would lose the weight.

        Raises:
            RuntimeError: always; :func:`mlx_lowbit.dequantize` gives a float copy.
        """
        raise RuntimeError(
            "QQLinear keeps its quantized weight; for a float copy call "
            "mlx_lowbit.dequantize(layer.weight, layer.scales, mode=layer.mode)"
        )

    @classmethod
    def from_linear(
        cls,
        linear_layer: mlx_nn.Module,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "nvfp4",
        *,
        global_scale: bool = False,
        nan_policy: str = "raise",
    ) -> QQLinear:
        """Quantize the weight of an ``mlx.nn.Linear``, at once; its ``bias`` is shared, not copied.

        Raises:
            TypeError: ``linear_layer`` has no two-dimensional float weight.
            ValueError: a mode other than mxfp8 and nvfp4, and as
                :meth:`QuantizedLinear.from_linear`.
        """
        check_activation_mode(cls.__name__, mode)
        weight = check_source("linear_layer", linear_layer, "an mlx.nn.Linear", 2)
        return quantized_from(
            cls,
            linear_layer,
            weight,
            bias=linear_layer.get("bias"),
            group_size=group_size,
            bits=bits,
            mode=mode,
            global_scale=global_scale,
            nan_policy=nan_policy,
        )

    @classmethod
    def from_quantized(cls, layer: mlx_nn.Module) -> QQLinear:
        """The same arrays as a quantized linear layer in mxfp8 or nvfp4, without a copy.

        Raises:
            TypeError: ``layer`` holds no two-dimensional quantized weight.
            ValueError: ``layer`` is in another mode, named together with the two that work.
        """
        check_quantized("layer", layer, "an mlx.nn.QuantizedLinear", 2)
        check_activation_mode(type(layer).__name__, layer.mode)
        return share(cls, layer)
