"""``mlx_lowbit.describe``: words about an image, from a vision language model."""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from . import cli
from .generate import check_options, show, stream_generate

if TYPE_CHECKING:
    from PIL import Image

NAME = "mlx_lowbit.describe"
PROMPT = "Describe this image."


def stream_describe(
    model: nn.Module,
    processor: Any,
    image: Image.Image | str | Path,
    prompt: str = PROMPT,
    *,
    history: Iterable[tuple[str, str]] = (),
    max_tokens: int = 256,
    **more: Any,
) -> Generator[Any, None, None]:
    """Pieces of an answer about an image, as :func:`mlx_lowbit.stream_generate` gives them.

    Args:
        model, processor: as :func:`mlx_lowbit.load` returns them for a model that sees images.
        image: Pillow's, of any mode, or the path of a file that Pillow opens.
        history: (question, answer) of the turns before, about the same image.
        more: further keywords of :func:`mlx_lowbit.stream_generate`.

    Raises:
        OSError: a file that cannot be read.
        ValueError: no image, an empty prompt, a prompt that does not fit, or another model.
    """
    if not hasattr(model, "encode_image"):
        kind = getattr(model, "model_type", type(model).__name__)
        raise ValueError(f"a model of type {kind} does not see images")
    inputs = processor(prompt, image, history)
    seen = model.embed_inputs(mx.array(inputs.tokens), pixel_values=inputs.pixel_values)
    yield from stream_generate(
        model,
        processor.tokenizer,
        inputs.tokens,
        max_tokens=max_tokens,
        input_embeddings=seen,
        **more,
    )


def describe(
    model: nn.Module,
    processor: Any,
    image: Image.Image | str | Path,
    prompt: str = PROMPT,
    **keywords: Any,
) -> str:
    """The whole text of :func:`stream_describe`, whose arguments it takes."""
    pieces = stream_describe(model, processor, image, prompt, **keywords)
    return "".join(piece.text for piece in pieces).strip()


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog=NAME, description="Says what an image shows.")
    parser.add_argument("image", help="a file that Pillow opens")
    cli.add_model_options(parser)
    parser.add_argument("--prompt", "-p", default=PROMPT)
    parser.add_argument("--max-tokens", "-m", type=int, default=256)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    return parser


def _command(options: argparse.Namespace) -> int:
    from .load import load
    from .models.moxin_processing import open_image

    settings = {name: getattr(options, name) for name in ("max_tokens", "temp", "top_p")}
    check_options(**settings)
    cli.seed(options.seed)
    image = open_image(options.image)
    model, processor = load(options.model, **cli.load_options(options))
    return show(stream_describe(model, processor, image, options.prompt, **settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return cli.run(NAME, _command, setup_arg_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
