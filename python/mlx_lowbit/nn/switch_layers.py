"""Layers with stacks of matrices, as subclasses of mlx-lm's, which this module imports."""

from __future__ import annotations

from mlx_lm.models import mla, switch_layers

from .experts import MultiProduct, QQSwitchProduct, SwitchProduct
from .layer import check_activation_mode, store_random


class QuantizedSwitchLinear(SwitchProduct, switch_layers.QuantizedSwitchLinear):
    """mlx-lm's ``QuantizedSwitchLinear``, the experts of a mixture, with this package's product.

    Parameters are frozen and named as in mlx-lm: ``weight`` uint32 [E, N, K * bits / 32],
    ``scales`` and (affine) ``biases`` [E, N, K / group_size], where present ``bias`` [E, N], and,
    for nvfp4 that was quantized so, ``global_scale`` float32 [E], which is saved with the others
    because the codes need it.
    """


class QQSwitchLinear(QQSwitchProduct, switch_layers.QuantizedSwitchLinear):
    """:class:`QuantizedSwitchLinear` which quantizes its input as well, in mxfp8 or nvfp4.

    The parameters are the same, so a checkpoint of either is one of both.

    Args:
        input_dims, output_dims, num_experts (int): the dimensions of the stack.
        bias (bool): with a ``bias`` of zeros for every expert. Default: ``True``, as in mlx-lm.
        group_size, bits (int, optional): default to the mode's.
        mode (str): ``"mxfp8"`` or ``"nvfp4"`` (the default).
        global_scale (bool): one float32 scale for every expert; nvfp4 only. Default: ``False``.

    Raises:
        ValueError: any other mode, named together with the two that work.
    """

    def __init__(
        self,
        input_dims: int,
        output_dims: int,
        num_experts: int,
        bias: bool = True,
        group_size: int | None = None,
        bits: int | None = None,
        mode: str = "nvfp4",
        global_scale: bool = False,
    ) -> None:
        check_activation_mode(type(self).__name__, mode)
        # Not by mlx-lm's constructor, which before 0.32 knows no global scales.
        store_random(
            self,
            (num_experts, output_dims, input_dims),
            bias=bias,
            group_size=group_size,
            bits=bits,
            mode=mode,
            global_scale=global_scale,
        )
        if not global_scale:
            self.global_scale = None


class QuantizedMultiLinear(MultiProduct, mla.QuantizedMultiLinear):
    """mlx-lm's ``QuantizedMultiLinear``, a matrix for each head, with this package's product.

    Parameters are frozen and named as in mlx-lm: ``weight`` uint32 [H, N, K * bits / 32],
    ``scales`` and (affine) ``biases`` [H, N, K / group_size].
    """
