"""The dense layer: MLX's ``Linear`` with a product that accumulates in float32 on every core."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as mlx_nn

from .. import ops
from .layer import LowbitLayer, check_source, share


class Linear(LowbitLayer, mlx_nn.Linear):
    """``y = x @ weight.T + bias`` in float32, float16 or bfloat16, accumulated in float32.

    The parameters, their names and the constructor are those of ``mlx.nn.Linear``: ``weight``
    [output_dims, input_dims] and, with ``bias=True``, ``bias`` [output_dims]. Quantizing it gives
    the quantized layers of this package.
    """

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., input_dims] -> [..., output_dims], in the dtype MLX would promote to."""
        return ops.linear(x, self["weight"], bias=self.get("bias"))

    def to_quantized(
        self,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        quantize_input: bool = False,
    ) -> mlx_nn.Module:
        """This layer as a ``QuantizedLinear``, or as a ``QQLinear`` with ``quantize_input=True``.

        Raises:
            ValueError: an unknown format, or ``quantize_input`` in a mode other than mxfp8 and
                nvfp4.
        """
        from .qqlinear import QQLinear
        from .quantized import QuantizedLinear

        cls = QQLinear if quantize_input else QuantizedLinear
        return cls.from_linear(self, group_size, bits, mode)

    @classmethod
    def from_linear(cls, linear_layer: mlx_nn.Module) -> Linear:
        """The same arrays as ``linear_layer`` (an ``mlx.nn.Linear``), without a copy.

        Raises:
            TypeError: ``linear_layer`` has no two-dimensional float weight.
        """
        check_source("linear_layer", linear_layer, "an mlx.nn.Linear", 2)
        return share(cls, linear_layer)
