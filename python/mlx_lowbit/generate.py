"""``mlx_lowbit.generate``: text from a model, with mlx-lm's generation, samplers and caches."""

from __future__ import annotations

import argparse
import json
import operator
import sys
from collections.abc import Callable, Generator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import cli, memory

NAME = "mlx_lowbit.generate"


def prompt_tokens(
    tokenizer: Any,
    prompt: str,
    *,
    system: str | None = None,
    thinking: bool | None = None,
    chat_template: bool = True,
    **template: Any,
) -> list[int]:
    """The ids that a model reads: `prompt` in the tokenizer's chat template, where it has one.

    Args:
        system: the system message; needs a chat template.
        thinking: what the template's ``enable_thinking`` is set to; None: whether the tokenizer has
            tokens for it.
        template: further values for the template.

    Raises:
        ValueError: `system` for a tokenizer without a chat template, a template that fails, or an
            empty prompt.
    """
    if not (chat_template and tokenizer.chat_template):
        if system is not None:
            raise ValueError("a system message needs a chat template, and this tokenizer has none")
        tokens = tokenizer.encode(prompt)
    else:
        from jinja2 import TemplateError

        messages = [{"role": "user", "content": prompt}]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        if thinking is not None:
            template["enable_thinking"] = thinking
        template |= {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
        try:
            tokens = tokenizer.apply_chat_template(messages, **template)
        except (TemplateError, TypeError) as error:
            raise ValueError(f"the chat template: {error}") from error
    if len(tokens) == 0:
        raise ValueError("the prompt is empty")
    return [int(token) for token in tokens]


# What options may be: outside of it mlx-lm goes on, stops, or fails at a later place.
_RANGES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_tokens": ("at least 1", lambda value: value >= 1),
    "temp": ("at least 0 and finite", lambda value: 0 <= value < float("inf")),
    "top_p": ("between 0 and 1", lambda value: 0 <= value <= 1),
    "min_p": ("between 0 and 1", lambda value: 0 <= value <= 1),
    "top_k": ("at least 0", lambda value: value >= 0),
    "max_kv_size": ("at least 1", lambda value: value >= 1),
    "prefill_step_size": ("at least 1", lambda value: value >= 1),
    "kv_bits": ("2, 3, 4, 5, 6 or 8", lambda value: value in (2, 3, 4, 5, 6, 8)),
    "kv_group_size": ("32, 64 or 128", lambda value: value in (32, 64, 128)),
    "quantized_kv_start": ("at least 0", lambda value: value >= 0),
}


def check_options(**options: Any) -> None:
    """Refuses values of generation that no model takes; None, and what is not known, passes.

    Raises:
        ValueError: naming the option.
    """
    for name, value in options.items():
        if name in _RANGES and value is not None and not _RANGES[name][1](value):
            raise ValueError(f"{name} must be {_RANGES[name][0]}, got {value}")


def check_prompt(model: nn.Module, tokens: Sequence[int]) -> None:
    """Refuses a prompt that does not fit the model.

    Raises:
        ValueError: no token, more than the model has positions for, or one that it has no row for.
    """
    if not tokens:
        raise ValueError("the prompt is empty")
    if min(tokens) < 0:
        raise ValueError(f"prompt: expected ids of tokens, got {min(tokens)}")
    args = getattr(model, "args", None)
    limit = getattr(args, "max_position_embeddings", None)
    if isinstance(limit, int) and len(tokens) > limit:
        raise ValueError(
            f"the prompt has {len(tokens)} tokens, and this model has positions for {limit}"
        )
    rows, largest = getattr(args, "vocab_size", None), max(tokens)
    if isinstance(rows, int) and largest >= rows:
        raise ValueError(
            f"the tokenizer is another model's: it gives the id {largest}, and the model has {rows}"
        )


def check_cache(
    model: nn.Module,
    *,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    max_kv_size: int | None = None,
    **more: Any,
) -> None:
    """Refuses a quantized cache that mlx-lm would fail to make, perhaps only in mid-text.

    Raises:
        ValueError: a cache of limited size, or groups that do not divide the model's heads.
    """
    if kv_bits is None:
        return
    if max_kv_size is not None and not hasattr(model, "make_cache"):
        raise ValueError("kv_bits and max_kv_size exclude each other")
    size = getattr(getattr(model, "args", None), "head_dim", None)
    if isinstance(size, int) and size % kv_group_size:
        raise ValueError(
            f"kv_group_size must divide the {size} dimensions of a head, got {kv_group_size}"
        )


def check_experts(model: nn.Module) -> None:
    """Refuses experts that cannot run where they are.

    Raises:
        ValueError: experts that are not quantized, in a half precision and on a CPU, whose
            products MLX has in float32 only; the first layer is named.
    """
    from mlx_lm.models.switch_layers import SwitchLinear

    if mx.default_device().type != mx.cpu:
        return
    for path, layer in model.named_modules():
        if isinstance(layer, SwitchLinear) and layer.weight.dtype != mx.float32:
            dtype = str(layer.weight.dtype).removeprefix("mlx.core.")
            raise ValueError(
                f"{path}: experts in {dtype} do not run on a CPU; quantize them while loading, "
                "for example with --q-bits 4"
            )


def stream_generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str | Sequence[int],
    *,
    max_tokens: int = 256,
    temp: float = 0.0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    top_k: int = 0,
    **more: Any,
) -> Generator[Any, None, None]:
    """Pieces of text as they come: mlx-lm's ``GenerationResponse`` with text and statistics.

    Args:
        model, tokenizer: as :func:`mlx_lowbit.load` returns them.
        prompt: text that goes to the model as it is, or ids (:func:`prompt_tokens`).
        max_tokens: at most so many; at the tokenizer's end tokens it stops before.
        temp, top_p, min_p, top_k: sampling as in mlx-lm; temp 0 takes the likeliest token.
        more: further keywords of mlx-lm's ``stream_generate`` (kv_bits, max_kv_size, ...).

    Raises:
        TypeError: a prompt that is neither text nor ids.
        ValueError: a prompt that does not fit the model, or a setting out of its range.
    """
    from mlx_lm.generate import stream_generate as of_mlx_lm
    from mlx_lm.sample_utils import make_sampler

    sampling = {"temp": temp, "top_p": top_p, "min_p": min_p, "top_k": top_k}
    check_options(max_tokens=max_tokens, **sampling, **more)
    check_cache(model, **more)
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    try:
        tokens = [operator.index(token) for token in ids]
    except TypeError:
        raise TypeError(f"prompt: expected text or whole numbers, got {prompt!r}") from None
    check_prompt(model, tokens)
    rows = getattr(getattr(model, "args", None), "vocab_size", None)
    if isinstance(rows, int) and top_k >= rows:
        raise ValueError(f"top_k must be below the {rows} tokens of the model, got {top_k}")
    sampler = make_sampler(temp, top_p, min_p, top_k=top_k)
    for response in of_mlx_lm(model, tokenizer, tokens, max_tokens, sampler=sampler, **more):
        response.peak_memory = memory.get_peak_memory() / 1e9
        yield response


def generate(model: nn.Module, tokenizer: Any, prompt: str | Sequence[int], **keywords: Any) -> str:
    """The whole text of :func:`stream_generate`, whose arguments it takes."""
    return "".join(r.text for r in stream_generate(model, tokenizer, prompt, **keywords))


def show(responses: Generator[Any, None, None]) -> int:
    """Prints text as it comes and mlx-lm's statistics after it; Ctrl-C ends the text there.

    Returns:
        The exit status: 0, or 130 after Ctrl-C.
    """
    last, status = None, 0
    try:
        for last in responses:
            print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        status = 130
    finally:
        responses.close()
    print("\n" + "=" * 10)
    print("No text generated for this prompt" if last is None else cli.statistics(last))
    return status


def json_object(text: str) -> dict[str, Any]:
    """An option that is a JSON object.

    Raises:
        argparse.ArgumentTypeError: anything else.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"no JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text}")
    return value


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line, with mlx-lm's names."""
    parser = argparse.ArgumentParser(
        prog=NAME, description="Generates text, with mlx_lowbit's kernels."
    )
    cli.add_model_options(parser)
    parser.add_argument("--prompt", "-p", default="hello", help="'-' reads standard input")
    parser.add_argument("--system-prompt", "--system", help="needs a chat template")
    parser.add_argument("--max-tokens", "-m", type=int, default=100)
    parser.add_argument("--temp", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=0.0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--ignore-chat-template", action="store_true")
    parser.add_argument(
        "--think", action=argparse.BooleanOptionalAction, help="for templates that can switch it"
    )
    parser.add_argument(
        "--extra-eos-token", nargs="+", default=(), help="tokens that end the text as well"
    )
    parser.add_argument("--max-kv-size", type=int)
    parser.add_argument("--prefill-step-size", type=int, default=2048)
    parser.add_argument("--kv-bits", type=int, help="quantize the KV cache")
    parser.add_argument("--kv-group-size", type=int, default=64)
    parser.add_argument("--quantized-kv-start", type=int, default=5000)
    parser.add_argument(
        "--chat-template-config", type=json_object, default={}, help="JSON of further settings"
    )
    return parser


def _command(options: argparse.Namespace) -> int:
    from .load import load

    names = ("temp", "top_p", "min_p", "top_k", "max_tokens", "kv_bits", "kv_group_size")
    names += ("quantized_kv_start", "max_kv_size", "prefill_step_size")
    settings = {name: getattr(options, name) for name in names}
    check_options(**settings)
    cli.seed(options.seed)
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    model, tokenizer = load(options.model, **cli.load_options(options))
    for method, command in (("encode_image", "describe"), ("audio_features", "transcribe")):
        if hasattr(model, method):
            raise ValueError(f"{options.model}: such a model is for mlx_lowbit.{command}")
    check_experts(model)
    for token in options.extra_eos_token:
        tokenizer.add_eos_token(token)
    tokens = prompt_tokens(
        tokenizer,
        prompt,
        system=options.system_prompt,
        thinking=options.think,
        chat_template=not options.ignore_chat_template,
        **options.chat_template_config,
    )
    check_prompt(model, tokens)
    return show(stream_generate(model, tokenizer, tokens, **settings))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return cli.run(NAME, _command, setup_arg_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
