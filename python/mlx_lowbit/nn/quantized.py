"""Weight-only quantized layers: the codes are decoded inside the product, x is left as it is."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as mlx_nn

from .. import ops
from .layer import (
    LowbitLayer,
    check_quantized,
    check_source,
    quantization,
    quantized_from,
    share,
    stored_global_scale,
)


class QuantizedLinear(LowbitLayer, mlx_nn.QuantizedLinear):
    """MLX's ``QuantizedLinear`` with this package's product: ``y = x @ decode(weight).T + bias``.

    Parameters are frozen and named as in MLX, so a checkpoint of either is one of both:

    - ``weight`` uint32 [output_dims, input_dims * bits / 32]
    - ``scales`` [output_dims, input_dims / group_size], a float dtype (affine) or uint8 (the other
      modes)
    - ``biases`` like ``scales`` in affine mode, else None
    - ``bias`` [output_dims] where the layer has one

    nvfp4 may add ``global_scale``, a float32 scalar with the largest magnitude of the weight. The
    codes cannot be decoded without it, so it is an ordinary parameter and is saved as
    ``<path>.global_scale``. Set it (to any scalar) before loading such a checkpoint. MLX's own
    layer has no such parameter and a strict load there fails instead of reading wrong weights.

    Example:
        >>> layer = mlx_lowbit.nn.QuantizedLinear.from_linear(linear, bits=4, group_size=64)
    """

    _seat = None

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., input_dims] -> [..., output_dims]: :func:`mlx_lowbit.quantized_matmul`."""
        if self._seat is not None and (part := self._seat.product(self, x)) is not None:
            return part
        get = self.get
        return ops.quantized_matmul(
            x,
            self["weight"],
            self["scales"],
            get("biases"),
            bias=get("bias"),
            global_scale=None if get("global_scale") is None else stored_global_scale(self),
            mode=self.mode,
            bits=self.bits,
            group_size=self.group_size,
        )

    @classmethod
    def from_linear(
        cls,
        linear_layer: mlx_nn.Module,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        *,
        global_scale: bool = False,
        nan_policy: str = "raise",
    ) -> QuantizedLinear:
        """Quantize the weight of an ``mlx.nn.Linear``; its ``bias`` is shared, not copied.

        ``nan_policy="raise"`` looks at the weight now; ``"propagate"`` leaves everything lazy.

        Raises:
            TypeError: ``linear_layer`` has no two-dimensional float weight.
            ValueError: an unknown format, input_dims no multiple of the group size, a weight that
                is not finite, or ``global_scale=True`` in a mode other than nvfp4.
        """
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
    def from_quantized(cls, layer: mlx_nn.Module) -> QuantizedLinear:
        """The same arrays as a quantized linear layer (MLX's, or a ``QQLinear``), without a copy.

        Raises:
            TypeError: ``layer`` holds no two-dimensional quantized weight.
        """
        check_quantized("layer", layer, "an mlx.nn.QuantizedLinear", 2)
        new = share(cls, layer)
        new.biases = layer.get("biases")
        return new


class QuantizedEmbedding(LowbitLayer, mlx_nn.QuantizedEmbedding):
    """MLX's ``QuantizedEmbedding``: rows decoded on look-up, ``as_linear`` for tied heads.

    Parameters are frozen and named as in MLX: ``weight`` uint32 [num_embeddings, dims * bits / 32],
    ``scales`` and ``biases`` [num_embeddings, dims / group_size]; with nvfp4 perhaps
    ``global_scale`` (see :class:`QuantizedLinear`).
    """

    def __call__(self, x: mx.array) -> mx.array:
        """x, integers of any shape [...] -> [..., dims]: :func:`mlx_lowbit.dequantize`."""
        rows = x.flatten()
        biases = self.get("biases")
        decoded = ops.dequantize(
            self["weight"][rows],
            self["scales"][rows],
            None if biases is None else biases[rows],
            global_scale=stored_global_scale(self),
            **quantization(self),
        )
        return decoded.reshape(*x.shape, self["scales"].shape[-1] * self.group_size)

    def as_linear(self, x: mx.array) -> mx.array:
        """x [..., dims] -> [..., num_embeddings], the product with every row."""
        return ops.quantized_matmul(
            x,
            self["weight"],
            self["scales"],
            self.get("biases"),
            global_scale=stored_global_scale(self),
            **quantization(self),
        )

    @classmethod
    def from_embedding(
        cls,
        embedding_layer: mlx_nn.Module,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "affine",
        *,
        global_scale: bool = False,
        nan_policy: str = "raise",
    ) -> QuantizedEmbedding:
        """Quantize the table of an ``mlx.nn.Embedding``.

        Raises:
            TypeError: ``embedding_layer`` has no two-dimensional float weight.
            ValueError: as :meth:`QuantizedLinear.from_linear`.
        """
        weight = check_source("embedding_layer", embedding_layer, "an mlx.nn.Embedding", 2)
        layer = quantized_from(
            cls,
            embedding_layer,
            weight,
            group_size=group_size,
            bits=bits,
            mode=mode,
            global_scale=global_scale,
            nan_policy=nan_policy,
        )
        layer.num_embeddings, layer.dims = weight.shape
        return layer

    @classmethod
    def from_quantized(cls, layer: mlx_nn.Module) -> QuantizedEmbedding:
        """The same arrays as an ``mlx.nn.QuantizedEmbedding``, without a copy.

        Raises:
            TypeError: ``layer`` is no quantized embedding.
        """
        check_quantized("layer", layer, "an mlx.nn.QuantizedEmbedding", 2)
        if not isinstance(layer, mlx_nn.QuantizedEmbedding):
            got = type(layer).__name__
            raise TypeError(f"layer: expected an mlx.nn.QuantizedEmbedding, got {got}")
        return share(cls, layer)
