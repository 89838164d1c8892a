"""``python -m mlx_lowbit.demo``: what ``accelerate`` does to an mlx-lm model on this machine.

Nothing is downloaded. For bfloat16 and for each judged format it

* quantizes a Llama with random weights with mlx-lm, saves it with mlx-lm to a temporary directory
  and loads it back,
* generates with ``mlx_lm.stream_generate``, accelerates the same model in place, and generates
  again,
* compares the logits of the tokens generated, before and after, with the same stored codes decoded
  and run in float64 (``demo_model.reference``): the error of the kernels and of bfloat16
  activations, not that of quantization,
* quantizes the small trained model that ships with the package, and measures, accelerated, its
  perplexity on those sources of this machine's Python standard library that it was not trained on,
  with a sample of its text.

Then it takes the three model definitions, tiny and random, from a checkpoint through ``convert`` to
``generate``, ``describe`` and ``transcribe`` (``demo_models``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from textwrap import indent
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_lowbit
from mlx_lowbit import demo_model, demo_models, formats
from mlx_lowbit.demo_model import measure, reference

BASELINE = "bfloat16"
PROMPT = "def "
TEMPERATURE = 0.6


@dataclass(frozen=True)
class Workload:
    """How much one run does. Dimensions quantized along are multiples of 128, the widest group.

    MLX's bfloat16 path on the CPU takes about 16 ns per weight and token (4-bit affine, measured on
    a 2.6 GHz server core), so few tokens are generated before acceleration: at 35 million weights
    each costs half a second.
    """

    hidden_size: int = 1280
    intermediate_size: int = 3456
    layers: int = 2
    prompt_tokens: int = 16
    tokens_before: int = 4
    tokens_after: int = 64
    repeats_after: int = 3
    windows: int = 48
    context: int = 256
    sample_tokens: int = 96


FULL = Workload()
QUICK = Workload(
    hidden_size=512,
    intermediate_size=1408,
    prompt_tokens=8,
    tokens_before=3,
    tokens_after=16,
    windows=16,
    sample_tokens=48,
)


@dataclass
class Row:
    """One line of the table. Logit differences are the largest absolute ones.

    ``memory_megabytes`` (10^6 bytes) counts the parameters of the random model and what
    ``accelerate`` adds to them, ``perplexity`` is that of the trained model per byte.
    """

    format: str
    bits_per_weight: float
    memory_megabytes: float
    prompt_tps_before: float
    prompt_tps_after: float
    generation_tps_before: float
    generation_tps_after: float
    logit_difference_before: float
    logit_difference_after: float
    largest_logit: float
    perplexity: float
    sample: str

    @property
    def speed_up(self) -> float:
        """Tokens generated per second after, over before."""
        return self.generation_tps_after / self.generation_tps_before


def judged_formats() -> list[formats.Format]:
    """The judged formats, one for each mode and width, at the mode's default group size."""
    widths = dict.fromkeys((f.mode, f.bits) for f in formats.FORMATS if f.judged)
    return [formats.get(mode, bits=bits) for mode, bits in widths]


def run(
    chosen: Sequence[formats.Format] | None = None,
    *,
    work: Workload = FULL,
    seed: int = 0,
    progress: bool | None = None,
) -> list[Row]:
    """Measures bfloat16 and each chosen format.

    Args:
        chosen: formats of the registry; :func:`judged_formats` by default.
        work: sizes of the model and lengths of the runs.
        seed: of the random weights, the prompt and the sampled text.
        progress: a progress bar on stderr; by default only if that is a terminal.

    Returns:
        one row for bfloat16, then one for each format, in their order.

    Raises:
        ModuleNotFoundError: mlx-lm is not installed.
        FileNotFoundError: the standard library has no source files on this machine.
        ValueError: a size in ``work`` does not fit.
    """
    from tqdm import tqdm

    cases = [None, *(judged_formats() if chosen is None else chosen)]
    windows = held_out_windows(work)
    config = measure.random_llama_config(
        hidden_size=work.hidden_size, intermediate_size=work.intermediate_size, layers=work.layers
    )
    disable = None if progress is None else not progress
    with (
        tempfile.TemporaryDirectory(prefix="mlx_lowbit_demo_") as directory,
        tqdm(total=2 * len(cases), disable=disable, leave=False, unit="run") as bar,
    ):
        measure.save_random_model(Path(directory), config, seed=seed)
        rows = []
        for case in cases:
            bar.set_description(_name(case))
            speed = measure_speed(case, Path(directory), work, seed)
            bar.update()
            rows.append(Row(**speed, **measure_quality(case, windows, work, seed)))
            bar.update()
        return rows


def measure_speed(
    case: formats.Format | None, dense: Path, work: Workload, seed: int
) -> dict[str, Any]:
    """Fields of :class:`Row`: speed and logit differences of the model at ``dense`` in a format."""
    from mlx_lm.utils import compute_bits_per_weight

    prompt = np.random.default_rng(seed).integers(0, 256, work.prompt_tokens).tolist()
    with measure.quantized_copy(dense, case) as (model, tokenizer, config):
        size, bits = measure.weight_bytes(model), compute_bits_per_weight(model)
        weights = reference.decoded_weights(model)
        before = measure.generate(model, tokenizer, prompt, work.tokens_before)
        caches = mlx_lowbit.accelerate(model).cache_bytes
        # A one-time cost is milliseconds: nothing beside a prompt before, much beside one after.
        runs = [
            measure.generate(
                model, tokenizer, prompt, work.tokens_after, warm_up=work.prompt_tokens
            )
            for _ in range(work.repeats_after)
        ]
    error_before, _ = measure.logit_difference(weights, config, prompt, before, work.tokens_before)
    error_after, largest = measure.logit_difference(
        weights, config, prompt, runs[0], work.tokens_before
    )
    return {
        "format": _name(case),
        "bits_per_weight": float(bits),
        "memory_megabytes": (size + caches) / 1e6,
        "prompt_tps_before": before.prompt_tps,
        "prompt_tps_after": median(run.prompt_tps for run in runs),
        "generation_tps_before": before.generation_tps,
        "generation_tps_after": median(run.generation_tps for run in runs),
        "logit_difference_before": error_before,
        "logit_difference_after": error_after,
        "largest_logit": largest,
    }


def measure_quality(
    case: formats.Format | None, windows: np.ndarray, work: Workload, seed: int
) -> dict[str, Any]:
    """Fields of :class:`Row`: perplexity and text of the trained model, accelerated, in a format.

    ``windows`` is int64 [W, context + 1].
    """
    from mlx_lm.sample_utils import make_sampler

    with measure.quantized_copy(demo_model.DIRECTORY, case) as (model, tokenizer, _):
        mlx_lowbit.accelerate(model)
        value = measure.perplexity(model, windows)
        mx.random.seed(seed)
        text = measure.generate(
            model,
            tokenizer,
            tokenizer.encode(PROMPT),
            work.sample_tokens,
            make_sampler(temp=TEMPERATURE),
        ).text
    return {"perplexity": value, "sample": PROMPT + text}


def held_out_windows(work: Workload) -> np.ndarray:
    """int64 [windows, context + 1] of the held-out part of this machine's standard library."""
    stream = demo_model.token_stream(demo_model.held_out_files())
    return demo_model.even_windows(stream, count=work.windows, context=work.context)


def _name(case: formats.Format | None) -> str:
    return BASELINE if case is None else case.name


_COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("", "format", lambda r: r.format),
    ("bits per", "weight", lambda r: f"{r.bits_per_weight:.2f}"),
    ("memory", "MB", lambda r: f"{r.memory_megabytes:.1f}"),
    (
        "prompt tokens/s",
        "before -> after",
        lambda r: f"{r.prompt_tps_before:.1f} -> {r.prompt_tps_after:.0f}",
    ),
    (
        "generation tokens/s",
        "before -> after",
        lambda r: f"{r.generation_tps_before:.1f} -> {r.generation_tps_after:.0f}",
    ),
    ("speed-up", "generation", lambda r: f"{r.speed_up:.1f}x"),
    (
        "max logit difference",
        "before -> after",
        lambda r: f"{r.logit_difference_before:.4f} -> {r.logit_difference_after:.4f}",
    ),
    ("perplexity", "per byte", lambda r: f"{r.perplexity:.3f}"),
)

_NOTES = """
Before: MLX's own layers. After: mlx_lowbit.accelerate(model). Generation is by
mlx_lm.stream_generate, with a Llama of {work.layers} layers, hidden size {work.hidden_size},
random weights and bfloat16 activations that mlx-lm saved and loaded, after a prompt of
{work.prompt_tokens} tokens; rates after are medians of {work.repeats_after} runs. Logit difference:
to the same stored weights decoded and run in float64, where the largest logit is {largest:.2f}.
Perplexity: the small trained model, accelerated, on {work.windows} x {work.context} bytes of
Python sources that it has not seen.

What it writes after {prompt!r}, at temperature {temperature}:"""


def table(rows: Sequence[Row]) -> str:
    """The rows as text: a heading of two lines, then a line for each row."""
    grid = [[top for top, _, _ in _COLUMNS], [low for _, low, _ in _COLUMNS]]
    grid += [[show(row) for _, _, show in _COLUMNS] for row in rows]
    first, *others = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = []
    for name, *cells in grid:
        right = [cell.rjust(width) for cell, width in zip(cells, others, strict=True)]
        lines.append("  ".join([name.ljust(first), *right]).rstrip())
    return "\n".join(lines)


def report(rows: Sequence[Row], work: Workload) -> str:
    """The table, what its columns mean, and a sample of text for each row."""
    notes = _NOTES.format(
        work=work,
        largest=max(row.largest_logit for row in rows),
        prompt=PROMPT,
        temperature=TEMPERATURE,
    )
    samples = [f"{row.format}:\n{indent(_printable(row.sample), '    ')}" for row in rows]
    return "\n".join([table(rows), notes, *samples])


def _printable(text: str) -> str:
    """The text with every character but newline and printable ASCII escaped, for any terminal."""
    kept = (c if c == "\n" or (c.isascii() and c.isprintable()) else ascii(c)[1:-1] for c in text)
    return "".join(kept)


def write_json(path: Path, rows: Sequence[Row], work: Workload, seed: int) -> None:
    """Writes the rows, with versions and sizes, to a temporary name that is then renamed."""
    from importlib.metadata import version

    record = {
        "versions": {name: version(name) for name in ("mlx", "mlx-lm")}
        | {"python": platform.python_version()},
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "seed": seed,
        "workload": asdict(work),
        "rows": [asdict(row) | {"speed_up": row.speed_up} for row in rows],
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``formats`` comes back as names of the registry."""
    names = [f.name for f in formats.FORMATS]
    parser = argparse.ArgumentParser(
        prog="mlx_lowbit.demo",
        description="Shows what mlx_lowbit.accelerate does to an mlx-lm model on this machine.",
    )
    parser.add_argument("--quick", action="store_true", help="a smaller model and shorter runs")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"formats to show instead of the judged ones, of: {', '.join(names)}",
    )
    parser.add_argument("--no-models", action="store_true", help="leave the tiny models out")
    parser.add_argument("--seed", type=int, default=0, help="of weights and text (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    args = parser.parse_args(argv)
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        parser.error(f"--json: expected a file in a directory that exists, got {args.json}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the demo and prints its report; returns the exit status."""
    args = parse_arguments(argv)
    try:
        import mlx_lm  # noqa: F401

        demo_model.held_out_files()
    except ModuleNotFoundError as error:
        print(f"mlx_lowbit.demo needs mlx-lm: pip install mlx-lm ({error})", file=sys.stderr)
        return 1
    except FileNotFoundError as error:
        print(
            f"mlx_lowbit.demo needs the sources of the standard library: {error}", file=sys.stderr
        )
        return 1
    chosen = None
    if args.formats:
        chosen = [f for name in args.formats for f in formats.FORMATS if f.name == name]
    work = QUICK if args.quick else FULL
    rows = run(chosen, work=work, seed=args.seed)
    print(report(rows, work))
    if args.json is not None:
        write_json(args.json, rows, work, args.seed)
    if not args.no_models:
        demo_models.run(args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
