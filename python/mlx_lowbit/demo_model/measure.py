"""The steps of the demo on one model: build, quantize by way of mlx-lm, generate, perplexity."""

from __future__ import annotations

import contextlib
import io
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_lowbit import demo_model
from mlx_lowbit.demo_model import reference
from mlx_lowbit.formats import Format

HEAD_DIM = 64
HEADS_PER_KV_HEAD = 4


@dataclass
class Generation:
    """One run of ``stream_generate``: rates in tokens per second, logits float32 [tokens, V]."""

    prompt_tps: float
    generation_tps: float
    tokens: list[int]
    text: str
    logits: np.ndarray = field(repr=False)


def random_llama_config(*, hidden_size: int, intermediate_size: int, layers: int) -> dict[str, Any]:
    """``config.json`` of a Llama over bytes, four query heads of 64 to each key head, tied head.

    Raises:
        ValueError: ``hidden_size`` is not a multiple of 256.
    """
    width = HEAD_DIM * HEADS_PER_KV_HEAD
    if hidden_size % width:
        raise ValueError(f"hidden_size: expected a multiple of {width}, got {hidden_size}")
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // HEAD_DIM,
        "num_key_value_heads": hidden_size // width,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": demo_model.VOCABULARY,
    }


def save_random_model(path: Path, config: dict[str, Any], *, seed: int) -> None:
    """Saves a bfloat16 Llama with random weights, and the byte tokenizer, with mlx-lm."""
    from mlx_lm import utils
    from mlx_lm.models import llama

    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    utils.save_model(path, model)
    utils.save_config(config, path / "config.json")
    utils.load_tokenizer(demo_model.DIRECTORY).save_pretrained(path)


@contextlib.contextmanager
def quantized_copy(source: Path, case: Format | None) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Quantizes ``source``, saves and loads it with mlx-lm: (model, tokenizer, config).

    ``None`` for the format loads it as it is. The copy lives in a temporary directory, which is
    removed when the context ends, by an error too.
    """
    from mlx_lm import utils

    if case is None:
        yield utils.load(str(source), return_config=True)
        return
    with tempfile.TemporaryDirectory(prefix="mlx_lowbit_demo_") as directory:
        path = Path(directory)
        model, tokenizer, config = utils.load(str(source), return_config=True)
        with contextlib.redirect_stdout(io.StringIO()):  # mlx-lm prints the bits per weight
            model, config = utils.quantize_model(
                model, config, case.group_size, case.bits, mode=case.mode
            )
        utils.save_model(path, model, donate_model=True)
        utils.save_config(config, path / "config.json")
        tokenizer.save_pretrained(path)
        yield utils.load(directory, return_config=True)


def generate(
    model: Any,
    tokenizer: Any,
    prompt: list[int],
    count: int,
    sampler: Callable[[mx.array], mx.array] | None = None,
    *,
    warm_up: int = 1,
) -> Generation:
    """``count`` tokens from ``mlx_lm.stream_generate``; an end token does not stop it.

    Greedy without a sampler. Before it, ``warm_up`` tokens and then one are run through the model,
    so that no rate holds a one-time cost of either shape.

    Raises:
        ValueError: ``count`` is below 2 (a rate needs two tokens).
    """
    from mlx_lm import stream_generate

    if count < 2:
        raise ValueError(f"count: expected at least 2, got {count}")
    for length in {warm_up, 1}:
        mx.eval(model(mx.zeros((1, length), mx.int32)))
    seen: list[mx.array] = []

    def keep(_: mx.array, logits: mx.array) -> mx.array:
        seen.append(logits)
        return logits

    ends, tokenizer.eos_token_ids = tokenizer.eos_token_ids, None
    try:
        responses = list(
            stream_generate(
                model,
                tokenizer,
                prompt,
                max_tokens=count,
                sampler=sampler,
                logits_processors=[keep],
            )
        )
    finally:
        tokenizer.eos_token_ids = ends
    last = responses[-1]
    return Generation(
        prompt_tps=last.prompt_tps,
        # generation_tps divides all tokens by the time since the first of them
        generation_tps=last.generation_tps * (count - 1) / count,
        tokens=[response.token for response in responses],
        text="".join(response.text for response in responses),
        logits=np.array(mx.concatenate(seen[:count]).astype(mx.float32)),
    )


def logit_difference(
    weights: reference.Weights,
    config: dict[str, Any],
    prompt: list[int],
    generation: Generation,
    count: int,
) -> tuple[float, float]:
    """Over the first ``count`` tokens generated: largest difference to float64, largest logit."""
    tokens = prompt + generation.tokens[: count - 1]
    true = reference.llama_logits(weights, config, tokens)[len(prompt) - 1 :]
    return float(np.abs(generation.logits[:count] - true).max()), float(np.abs(true).max())


def weight_bytes(model: Any) -> int:
    """Bytes of all parameters: packed weights, scales, biases, norms."""
    from mlx.utils import tree_flatten

    return sum(value.nbytes for _, value in tree_flatten(model.parameters()))


def perplexity(model: Any, windows: np.ndarray, *, batch: int = 8) -> float:
    """exp of the mean negative log-likelihood per token, which for bytes is per byte.

    Args:
        model: an mlx-lm model.
        windows: int64 [W, context + 1], as ``demo_model.even_windows`` returns them.
        batch: windows a forward pass.
    """
    total = 0.0
    for i in range(0, len(windows), batch):
        rows = mx.array(windows[i : i + batch])
        logits = model(rows[:, :-1]).astype(mx.float32)
        chosen = mx.take_along_axis(logits, rows[:, 1:, None], axis=-1)[..., 0]
        total += (mx.logsumexp(logits, axis=-1) - chosen).sum().item()
    return math.exp(total / windows[:, 1:].size)
