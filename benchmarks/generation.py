"""What a language model of mlx-lm takes for a prompt and for each token after it, on the clock."""

from __future__ import annotations

import datetime
import statistics
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from benchmarks.device import device_name
from benchmarks.files import write_json


def prefill(model: nn.Module, tokens: mx.array) -> tuple[mx.array, list[Any], float]:
    """(logits of the last position, cache, seconds)."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    mx.synchronize()
    begin = time.perf_counter()
    logits = model(tokens, cache=cache)[:, -1]
    mx.eval(logits, [c.state for c in cache])
    return logits, cache, time.perf_counter() - begin


def decode(model: nn.Module, logits: mx.array, cache: list[Any], count: int) -> float:
    """Tokens a second and sequence, the median of five parts."""
    token = mx.argmax(logits, axis=-1)
    mx.async_eval(token)
    parts = []
    for _ in range(6):
        begin = time.perf_counter()
        for _ in range(count // 5):
            following = mx.argmax(model(token[:, None], cache=cache)[:, -1], axis=-1)
            mx.async_eval(following)
            mx.eval(token)
            token = following
        parts.append((count // 5) / (time.perf_counter() - begin))
    return statistics.median(parts[1:])


def measure(
    model: nn.Module, name: str, vocabulary: int, prompts: list[tuple[int, int]], tokens: int
) -> Iterator[dict[str, Any]]:
    """A row for every (batch, tokens of each prompt), whose `tokens` tokens follow.

    The peak of the memory is that since it was last reset.
    """
    for batch, prompt in prompts:
        ids = mx.random.randint(0, vocabulary, (batch, prompt))
        *_, first = prefill(model, ids)
        logits, cache, seconds = prefill(model, ids)
        row = {
            "weights": name,
            "batch": batch,
            "prompt": prompt,
            "first_prefill_s": round(first, 3),
            "prefill_tokens_per_sec": round(batch * prompt / seconds, 1),
            "decode_tokens_per_sec": round(batch * decode(model, logits, cache, tokens), 1),
            "peak_memory_gb": round(mx.get_peak_memory() / 1e9, 2),
        }
        del logits, cache
        yield row


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['weights']:10} batch {row['batch']:3}  "
        f"prefill {row['prefill_tokens_per_sec']:10.1f}  "
        f"decode {row['decode_tokens_per_sec']:8.1f} tokens-per-sec  "
        f"first prefill {row['first_prefill_s']:.2f} s  "
        f"peak memory {row['peak_memory_gb']:.1f} GB",
        flush=True,
    )


def write(path: Path, rows: list[dict[str, Any]], **more: Any) -> None:
    """All rows so far: a run takes minutes, most of them MLX's compiler's."""
    about = {
        "device": device_name(),
        "date": datetime.date.today().isoformat(),
        "mlx": mx.__version__,
        "mlx_lm": version("mlx-lm"),
    }
    write_json(path, {**about, **more, "rows": rows})
