"""Products with stacks of quantized matrices, for mlx-lm's and mlx-vlm's own layer classes.

mlx-lm and mlx-vlm each define ``QuantizedSwitchLinear`` and ``QuantizedMultiLinear``, with the same
parameters. The behaviour is therefore here, in mixins which import neither, and ``over`` joins it
with either one's class.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as mlx_nn

from .. import formats, ops
from .layer import (
    LowbitLayer,
    check_activation_mode,
    check_quantized,
    check_source,
    quantization,
    quantized_from,
    share,
    stored_global_scale,
)
from .qqlinear import global_scales


class SwitchProduct(LowbitLayer):
    """One matrix of a stack [E, N, K] for every row of x, chosen by index; x is left as it is."""

    __slots__ = ()
    _seat = None

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """The product of each row with the matrix its index names: :func:`mlx_lowbit.gather_qmm`.

        x [..., 1, K] and indices [...] into E, which broadcast against each other -> [..., 1, N].
        """
        if (part := self._shared(x, indices, sorted_indices)) is not None:
            return part
        return ops.gather_qmm(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            rhs_indices=indices,
            bias=self.get("bias"),
            sorted_indices=sorted_indices,
            global_scale=stored_global_scale(self),
            **quantization(self),
        )

    def _shared(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array | None:
        """This layer's part of a product that it shares, or None."""
        if self._seat is None:
            return None
        return self._seat.product(self, x, indices, sorted_indices=sorted_indices)

    def _extra_repr(self) -> str:
        # mlx.nn.quantize leaves None here where it was called with the mode's defaults.
        group_size = self.group_size or formats.get(mode=self.mode).group_size
        bits = self.bits or formats.get(mode=self.mode).bits
        return (
            f"input_dims={self.scales.shape[-1] * group_size}, output_dims={self.output_dims}, "
            f"num_experts={self.num_experts}, bias={'bias' in self}, "
            f"group_size={group_size}, bits={bits}, mode={self.mode}"
        )

    @classmethod
    def from_linear(
        cls,
        switch_linear: mlx_nn.Module,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        *,
        global_scale: bool = False,
        nan_policy: str = "raise",
    ) -> SwitchProduct:
        """Quantize the stack of a ``SwitchLinear``; its ``bias`` is shared, not copied.

        With ``global_scale=True`` (nvfp4) every expert gets its own.

        Raises:
            TypeError: ``switch_linear`` has no three-dimensional float weight.
            ValueError: as :meth:`mlx_lowbit.nn.QuantizedLinear.from_linear`.
        """
        weight = check_source("switch_linear", switch_linear, "a SwitchLinear", 3)
        layer = quantized_from(
            cls,
            switch_linear,
            weight,
            bias=switch_linear.get("bias"),
            group_size=group_size,
            bits=bits,
            mode=mode,
            global_scale=global_scale,
            nan_policy=nan_policy,
        )
        if not global_scale:
            layer.global_scale = None
        return layer

    @classmethod
    def from_quantized(cls, layer: mlx_nn.Module) -> SwitchProduct:
        """The same arrays as a quantized switch layer, without a copy.

        Raises:
            TypeError: ``layer`` holds no three-dimensional quantized weight.
        """
        check_quantized("layer", layer, "a QuantizedSwitchLinear", 3)
        return share(cls, layer)


class QQSwitchProduct(SwitchProduct):
    """The same with x quantized first, in the layer's own mode (mxfp8 or nvfp4)."""

    __slots__ = ()

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """The product of each row with the matrix its index names: :func:`mlx_lowbit.gather_qqmm`.

        x [..., 1, K] and indices [...] into E, which broadcast against each other -> [..., 1, N].
        """
        if (part := self._shared(x, indices, sorted_indices)) is not None:
            return part
        return ops.gather_qqmm(
            x,
            self["weight"],
            self["scales"],
            rhs_indices=indices,
            bias=self.get("bias"),
            sorted_indices=sorted_indices,
            **global_scales(stored_global_scale(self)),
            **quantization(self),
        )

    @classmethod
    def from_linear(
        cls,
        switch_linear: mlx_nn.Module,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "nvfp4",
        *,
        global_scale: bool = False,
        nan_policy: str = "raise",
    ) -> SwitchProduct:
        """As :meth:`SwitchProduct.from_linear`, in mxfp8 or nvfp4.

        Raises:
            ValueError: any other mode, named together with the two that work.
        """
        check_activation_mode(cls.__name__, mode)
        return super().from_linear(
            switch_linear,
            group_size,
            bits,
            mode,
            global_scale=global_scale,
            nan_policy=nan_policy,
        )

    @classmethod
    def from_quantized(cls, layer: mlx_nn.Module) -> SwitchProduct:
        """As :meth:`SwitchProduct.from_quantized`, of a layer in mxfp8 or nvfp4.

        Raises:
            ValueError: any other mode, named together with the two that work.
        """
        new = super().from_quantized(layer)
        check_activation_mode(type(layer).__name__, new.mode)
        return new


class MultiProduct(LowbitLayer):
    """One matrix of a stack [H, N, K] for every head of x, as in latent attention."""

    __slots__ = ()

    def __call__(self, x: mx.array, transpose: bool = True) -> mx.array:
        """x [..., H, L, K] -> [..., H, L, N]; the other way round with ``transpose=False``."""
        return ops.quantized_matmul(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            transpose=transpose,
            **quantization(self),
        )


def over(product: type[LowbitLayer], base: type[mlx_nn.Module]) -> type[mlx_nn.Module]:
    """The class with the parameters of ``base`` and the call of ``product``, once for a pair."""
    for cls in base.__subclasses__():
        if cls.__bases__ == (product, base):
            return cls
    prefix = "QQ" if product is QQSwitchProduct else ""
    name = prefix + base.__name__.removeprefix("Quantized" if prefix else "")
    return type(name, (product, base), {"__module__": __name__, "__doc__": product.__doc__})
