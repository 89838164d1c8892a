"""``python -m benchmarks``: one table, one JSON file, one plot."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_lowbit import formats

from benchmarks import cases, metal_counts, plot, report
from benchmarks.baselines import OURS, load_peers
from benchmarks.cases import Case, Selection
from benchmarks.device import device_name, last_level_cache, target_name, thread_count
from benchmarks.measure import Measurer, Row, Settings, cold_bytes
from benchmarks.operands import make_weights
from benchmarks.timing import Bandwidth

QUICK_SECONDS = 100  # with the imports and the plot within two minutes
RESULTS = Path(__file__).parent / "results"
METHOD = (
    "libraries in turn, block by block; median of block medians; spread = (largest - smallest "
    "block) / median; * = other processes took over 8 % of the cores, read it as an upper bound"
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with lists checked and resolved."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Times mlx_lowbit, and what is installed of MLX, torch, onnxruntime, OpenVINO.",
        epilog="Everything takes over an hour on two cores, most of it MLX's: choose, or --quick.",
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a selection that ends within two minutes")
    add("--metal-counts", action="store_true", help="what Metal kernels read and compute: counts")
    add("--ops", help=f"out of {', '.join(cases.OPS)}, comma-separated (default: all)")
    add("--formats", help="judged (default), common (of these, each mode's own group), all, names")
    add("--shapes", help="names or beginnings of names in cases.py, KxN, or all")
    add("--dtypes", help=f"out of {', '.join(cases.DTYPES)} (default: bfloat16,float32)")
    add("--m", help="numbers of tokens, comma-separated (default: each op's own)")
    add("--cold", action="store_true", help="rotate copies of the weights, past every cache")
    add("--no-baselines", action="store_true", help="time ours alone")
    add("--seconds", type=float, help="of timing for each case (default 3; quick 0.4)")
    add("--limit", type=float, help="seconds one call of a peer may take (default 5; quick 1)")
    add("--seed", type=int, default=0, help="of weights and activations (default 0)")
    add("--out", type=Path, help="the JSON file; the plot goes beside it (default: results/)")
    args = parser.parse_args(arguments)
    try:
        resolve(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def resolve(args: argparse.Namespace) -> None:
    """Replaces names by what they name, and absent options by their defaults.

    Raises:
        ValueError: a name that does not exist or a number out of range.
    """
    args.m = _numbers("m", args.m) if args.m is not None else ()
    args.ops = _names("ops", args.ops, cases.OPS) if args.ops is not None else cases.OPS
    args.dtypes = _names("dtypes", args.dtypes, cases.DTYPES) if args.dtypes is not None else ()
    shapes = cases.QUICK_SHAPES if args.quick else cases.DEFAULT_SHAPES
    args.shapes = cases.select_shapes(",".join(shapes) if args.shapes is None else args.shapes)
    chosen = args.formats or ("common" if args.quick else "judged")
    args.formats = cases.select_formats("judged" if chosen == "common" else chosen, formats.FORMATS)
    if chosen == "common":
        args.formats = tuple(f for f in args.formats if formats.get(f.mode, f.bits) == f)
    for name, usual, quick in (("seconds", 3.0, 0.4), ("limit", 5.0, 1.0)):
        given = getattr(args, name)
        value = (quick if args.quick else usual) if given is None else given
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive number; got {value}")
        setattr(args, name, value)


def _names(argument: str, given: str, known: Sequence[str]) -> tuple[str, ...]:
    for name in given.split(","):
        if name not in known:
            raise ValueError(f"{argument}: expected some of {', '.join(known)}; got {name!r}")
    return tuple(given.split(","))


def _numbers(argument: str, given: str) -> tuple[int, ...]:
    if not all(part.isdigit() and int(part) > 0 for part in given.split(",")):
        raise ValueError(f"{argument}: expected positive integers; got {given!r}")
    return tuple(sorted({int(part) for part in given.split(",")}))


def choose_cases(args: argparse.Namespace) -> list[Case]:
    """The cases of the command line; quick: products first, fewer M, float32 for matvec alone."""

    def chosen(ops: Sequence[str], dtypes: Sequence[str], m: Sequence[int] = ()) -> Iterator[Case]:
        ops = [op for op in ops if op in args.ops]
        selection = Selection(ops, args.formats, args.shapes, args.dtypes or dtypes, args.m or m)
        return cases.enumerate_cases(selection)

    if not args.quick:
        return list(chosen(args.ops, ("bfloat16", "float32")))
    parts = [
        chosen(["matvec", "matmul"], ["bfloat16"], (1, 8, 64, 512)),
        [] if args.dtypes else chosen(["matvec"], ["float32"], (1, 8)),
        chosen(["linear", "qqmm", "quantize", "dequantize"], ["bfloat16"], (1, 8, 64, 512)),
        chosen(["gather"], ["bfloat16"]),
    ]
    return [case for part in parts for case in part]


def describe_run(args: argparse.Namespace, settings: Settings, threads: int) -> dict[str, Any]:
    """What the JSON file says about the run, but for the peers."""
    weights = "hot: one copy, read again and again"
    if args.cold:
        rotated, cache = (n // 2**20 for n in (cold_bytes(), last_level_cache()))
        weights = f"cold: {rotated} MiB of copies in rotation, last level cache {cache} MiB"
    return {
        "device": device_name(),
        "target": target_name(),
        "threads": threads,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "settings": dataclasses.asdict(settings),
        "weights": weights,
        "method": METHOD,
        "bandwidth_method": Bandwidth.METHOD,
    }


def run(args: argparse.Namespace) -> int:
    """Measures, prints, writes.

    Returns:
        the exit status: 1 if a result of ours was wrong or missing.
    """
    deadline = time.perf_counter() + (QUICK_SECONDS if args.quick else math.inf)
    threads = thread_count()
    peers, versions, missing = load_peers(threads)
    if args.no_baselines:
        peers, missing = {OURS: peers[OURS]}, []
    rounds, retries = (3, 0) if args.quick else (5, 2)
    settings = Settings(args.seconds, rounds, retries, args.cold, args.seed)
    about = describe_run(args, settings, threads) | {
        "versions": versions,
        "peers": {peer.name: peer.note for peer in peers.values()},
        "missing": missing,
    }
    print(report.describe(about), report.table_header(list(peers)), sep="\n\n", flush=True)

    todo = choose_cases(args)
    bandwidth = Bandwidth(threads)
    rows = measure_all(args, todo, Measurer(peers, bandwidth, settings), list(peers), deadline)
    left_out = [case.label for case in todo[len(rows) :]]
    if left_out:
        print(f"not run, out of time: {len(left_out)} cases, from {left_out[0]}")
    about |= {"not_run": left_out, "read_bandwidth_of_mib": bandwidth.measured()}

    marks = ["quick"] * args.quick + ["cold"] * args.cold
    stem = "-".join(
        [report.slug(f"{about['device']} {about['target']}"), about["date"][:10], *marks]
    )
    out = args.out or RESULTS / f"{stem}.json"
    report.write_json(out, about, rows)
    common = [f.name for f in args.formats if f == formats.get(f.mode, f.bits)]
    drawn = plot.write(out.with_suffix(".png"), about, rows, common)
    print(f"\nwrote {out}" + f" and {out.with_suffix('.png').name}" * drawn)
    return int(any(row.ours is None for row in rows))


def measure_all(
    args: argparse.Namespace,
    todo: Sequence[Case],
    measurer: Measurer,
    peers: Sequence[str],
    deadline: float,
) -> list[Row]:
    """Measures and prints the cases in turn until ``deadline``."""
    rows: list[Row] = []
    key, weights = None, None
    with _Progress(len(todo)) as progress:
        for case in todo:
            remaining = deadline - time.perf_counter()
            if remaining <= 0:
                break
            if weights is None or key != (case.shape, case.dtype, case.format):
                key = (case.shape, case.dtype, case.format)
                fmt = next((f for f in args.formats if f.name == case.format), None)
                weights = make_weights(case.shape, case.dtype, fmt, args.seed)
            # A slow call may take what five average cases have left: few cases have one.
            limit = min(args.limit, 5 * remaining / (len(todo) - len(rows)))
            rows.append(measurer.row(case, weights, limit))
            progress.line(report.table_row(rows[-1], peers))
    return rows


class _Progress:
    """A bar below the table on a terminal that has tqdm; plain lines elsewhere."""

    def __init__(self, total: int) -> None:
        self._bar: Any = None
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self._bar = tqdm(total=total, leave=False, unit="case")
            except ImportError:
                pass

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def line(self, text: str) -> None:
        """Prints a finished row."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text, file=sys.stdout)
            self._bar.update()


if __name__ == "__main__":
    arguments = parse_arguments()
    sys.exit(metal_counts.main() if arguments.metal_counts else run(arguments))
