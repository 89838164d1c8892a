"""Layers whose products run through :mod:`mlx_lowbit.ops`.

Each one subclasses MLX's layer of the same name (the switch layers: mlx-lm's) and stores its
weights under the same names, so checkpoints, ``isinstance`` tests, LoRA and ``mlx.nn.quantize`` see
what they expect. The layers which need mlx-lm are imported when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .linear import Linear
from .qqlinear import QQLinear
from .quantized import QuantizedEmbedding, QuantizedLinear

if TYPE_CHECKING:
    from .switch_layers import QQSwitchLinear, QuantizedMultiLinear, QuantizedSwitchLinear

_NEED_MLX_LM = ("QQSwitchLinear", "QuantizedMultiLinear", "QuantizedSwitchLinear")

__all__ = [
    "Linear",
    "QQLinear",
    "QQSwitchLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "QuantizedMultiLinear",
    "QuantizedSwitchLinear",
]


def __getattr__(name: str) -> Any:
    if name not in _NEED_MLX_LM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import switch_layers

    return getattr(switch_layers, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
