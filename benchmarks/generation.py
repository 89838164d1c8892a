"""What a language model of mlx-lm takes for a prompt and for each token after it, on the clock."""

from __future__ import annotations

import datetime
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lowbit import memory

from benchmarks.device import device_name
from benchmarks.files import write_json
from benchmarks.spread import median_and_spread

PREFILLS, PARTS = 3, 5


class Run:
    """A model, its prompt and what follows: greedy, one `async_eval` a token."""

    def __init__(self, model: nn.Module, ids: mx.array):
        self.model, self.ids = model, ids
        self.nbytes = sum(p.nbytes for _, p in tree_flatten(model.parameters()))
        self.prefill_s: list[float] = []
        self.rates: list[float] = []  # tokens a second and sequence, of parts of what follows
        self.peak = 0  # bytes, with the weights

    def prefill(self) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self.cache = self.token = None
        mx.clear_cache()
        before = memory.get_active_memory()
        memory.reset_peak_memory()
        self.cache = make_prompt_cache(self.model)
        mx.synchronize()
        begin = time.perf_counter()
        logits = self.model(self.ids, cache=self.cache)[:, -1]
        mx.eval(logits, [c.state for c in self.cache])
        self.prefill_s.append(time.perf_counter() - begin)
        self.peak = max(self.peak, memory.get_peak_memory() - before + self.nbytes)
        self.token = mx.argmax(logits, axis=-1)
        mx.eval(self.token)

    def _steps(self, count: int) -> None:
        for _ in range(count):
            logits = self.model(self.token[:, None], cache=self.cache)[:, -1]
            following = mx.argmax(logits, axis=-1)
            mx.async_eval(following)
            mx.eval(self.token)
            self.token = following

    def decode(self, count: int) -> None:
        self._steps(2)  # the GPU has work from here on
        begin = time.perf_counter()
        self._steps(count)
        self.rates.append(count / (time.perf_counter() - begin))
        mx.synchronize()


def measure(
    models: dict[str, nn.Module], vocabulary: int, batch: int, prompt: int, tokens: int
) -> list[dict[str, Any]]:
    """A row for each model: `batch` prompts of `prompt` tokens, and some `tokens` after each.

    Models take turns, since what else a host does, and how warm a GPU is, changes within a minute.
    Medians, without the first time, and half of the spread over the median.
    """
    ids = mx.random.randint(0, vocabulary, (batch, prompt))
    runs = {name: Run(model, ids) for name, model in models.items()}
    for _ in range(1 + PREFILLS):
        for run in runs.values():
            run.prefill()
    for _ in range(1 + PARTS):
        for run in runs.values():
            run.decode(max(1, tokens // PARTS))
    return [
        {
            "weights": name,
            "batch": batch,
            "prompt": prompt,
            "first_prefill_s": round(run.prefill_s[0], 3),
            **_rate("prefill", [batch * prompt / seconds for seconds in run.prefill_s[1:]]),
            **_rate("decode", [batch * rate for rate in run.rates[1:]]),
            "peak_memory_gb": round(run.peak / 1e9, 2),
        }
        for name, run in runs.items()
    ]


def _rate(what: str, rates: list[float]) -> dict[str, float]:
    median, spread = median_and_spread(rates)
    return {f"{what}_tokens_per_sec": round(median, 1), f"{what}_spread": round(spread, 3)}


def show(row: dict[str, Any]) -> None:
    print(
        f"{row['weights']:10} batch {row['batch']:3}  "
        f"prefill {row['prefill_tokens_per_sec']:8.1f} ± {row['prefill_spread']:3.0%}  "
        f"decode {row['decode_tokens_per_sec']:7.1f} ± {row['decode_spread']:3.0%} tokens-per-sec  "
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
