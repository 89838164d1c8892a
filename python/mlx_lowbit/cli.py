"""What the commands share: options of a model, statistics, and errors as one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

# What a user can mend: said in one line, without a traceback.
MENDABLE = (ValueError, OSError, ImportError, RuntimeError, KeyError, MemoryError)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """--model, and how it is to be quantized while it is loaded."""
    parser.add_argument("--model", required=True, help="a local directory or a Hugging Face id")
    parser.add_argument(
        "-qa",
        "--quantize-activations",
        action="store_true",
        help="quantize activations too: models in mxfp8 or nvfp4 only",
    )
    parser.add_argument(
        "--q-bits", "--bits", type=int, help="quantize while loading, in so many bits"
    )
    parser.add_argument("--q-mode", "--mode", help="affine, mxfp4, mxfp8 or nvfp4")
    parser.add_argument("--q-group-size", "--group-size", type=int)


def load_options(options: argparse.Namespace) -> dict[str, Any]:
    """Keywords of :func:`mlx_lowbit.load` from the options above."""
    return {
        "quantize_activations": options.quantize_activations,
        "bits": options.q_bits,
        "mode": options.q_mode,
        "group_size": options.q_group_size,
    }


def seed(value: int | None) -> None:
    """Seeds what is sampled; None leaves it as it is.

    Raises:
        ValueError: no seed that MLX takes.
    """
    if value is None:
        return
    if not 0 <= value < 2**64:
        raise ValueError(f"seed must be between 0 and 2**64 - 1, got {value}")
    mx.random.seed(value)


def statistics(*responses: Any) -> str:
    """The lines that mlx-lm prints after a generation, of one or more by their last responses."""

    def line(name: str, kind: str) -> str:
        found = [(getattr(r, f"{kind}_tokens"), getattr(r, f"{kind}_tps")) for r in responses]
        tokens, seconds = sum(n for n, _ in found), sum(n / rate for n, rate in found if rate)
        return f"{name}: {tokens} tokens, {tokens / (seconds or 1):.3f} tokens-per-sec"

    peak = max(response.peak_memory for response in responses)
    lines = line("Prompt", "prompt"), line("Generation", "generation")
    return "\n".join([*lines, f"Peak memory: {peak:.3f} GB"])


def one_line(error: BaseException) -> str:
    """The message of an error without line ends."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    return " ".join(text.split()) or type(error).__name__


def run(
    name: str, command: Callable[[argparse.Namespace], int], parser: argparse.ArgumentParser,
    argv: Sequence[str] | None,
) -> int:  # fmt: skip
    """The exit status of a command: 1 and one line for an error, 130 for Ctrl-C."""
    options = parser.parse_args(argv)
    try:
        return command(options)
    except BrokenPipeError:  # whoever read the output has enough; Python flushes it at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print(f"\n{name}: stopped", file=sys.stderr)
        return 130
    except MENDABLE as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        return 1
