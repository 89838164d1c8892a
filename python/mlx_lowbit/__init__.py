"""Fast low-bit layers for MLX: fused dequantize-matmul for the formats that MLX stores.

import mlx_lowbit
model, tokenizer = mlx_lm.load("...-4bit")
mlx_lowbit.accelerate(model)
"""

from . import _load

_load.check()

from . import formats, nn  # noqa: E402
from .accelerate import accelerate, undo  # noqa: E402
from .backend import get_backend, set_backend  # noqa: E402
from .ops import (  # noqa: E402
    dequantize,
    explain,
    gather_qmm,
    gather_qqmm,
    linear,
    qqmm,
    quantized_matmul,
)

# Last, so that the function and not the module of this name is what the package shows.
from .quantize import quantize_activations  # noqa: E402  isort: skip
from .ops import quantize  # noqa: E402  isort: skip

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "dequantize",
    "explain",
    "formats",
    "gather_qmm",
    "gather_qqmm",
    "get_backend",
    "linear",
    "nn",
    "qqmm",
    "quantize",
    "quantize_activations",
    "quantized_matmul",
    "set_backend",
    "undo",
]
