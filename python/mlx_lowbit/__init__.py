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

# Last, so that functions and not the modules of their names are what the package shows.
from .quantize import quantize_activations  # noqa: E402  isort: skip
from .ops import quantize  # noqa: E402  isort: skip
from .load import load  # noqa: E402  isort: skip
from .save import save  # noqa: E402  isort: skip
from .convert import convert  # noqa: E402  isort: skip
from .generate import generate, stream_generate  # noqa: E402  isort: skip
from .describe import describe, stream_describe  # noqa: E402  isort: skip
from .transcribe import stream_transcribe, transcribe  # noqa: E402  isort: skip

__version__ = "0.1.0"

__all__ = [
    "accelerate",
    "convert",
    "dequantize",
    "describe",
    "explain",
    "formats",
    "gather_qmm",
    "gather_qqmm",
    "generate",
    "get_backend",
    "linear",
    "load",
    "nn",
    "qqmm",
    "quantize",
    "quantize_activations",
    "quantized_matmul",
    "save",
    "set_backend",
    "stream_describe",
    "stream_generate",
    "stream_transcribe",
    "transcribe",
    "undo",
]
