"""The table on the terminal and the JSON file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import files
from benchmarks.baselines import OURS
from benchmarks.measure import Row

COLUMNS = (
    f"{'op':<10} {'format':<12} {'dtype':<8} {'M':>4} {'K':>5} {'N':>5} {'median ms':>9} "
    f"{'spread':>7} {'GB/s':>6} {'% read':>6} {'GFLOP/s':>7} {'error':>7}"
)


def table_header(peers: Sequence[str]) -> str:
    """The two lines above the rows."""
    ratios = [p for p in peers if p != OURS]
    above = f"{'':{len(COLUMNS)}} | time of the peer / ours: above 1 ours is faster\n"
    return above * bool(ratios) + " ".join([COLUMNS, "|", *(f"{p:>6}" for p in ratios)])


def table_row(row: Row, peers: Sequence[str]) -> str:
    """One line for a case; ``*`` after the median of a dirty one."""
    case, shape, ours = row.case, row.case.shape, row.ours
    head = f"{case.op:<10} {case.format:<12} {case.dtype:<8} {case.m or '-':>4}"
    head += f" {shape.k:>5} {shape.n:>5}"
    rate, flops = row.bytes_per_second, row.flops_per_second
    if ours is None or rate is None:
        return f"{head} {row.skipped.get(OURS, 'not available')}"
    cells = [
        f"{three_digits(ours.median * 1e3):>9}{'*' if row.dirty else ' '}",
        f"{ours.spread:>6.0%}",
        f"{rate / 1e9:>6.1f}",
        f"{rate / row.bandwidth:>6.0%}",
        f"{flops / 1e9:>7.0f}" if flops else f"{'-':>7}",
        f"{row.errors[OURS]:>7.0e}",
        "|",
    ]
    ratios = ((max(6, len(p)), row.ratio(p)) for p in peers if p != OURS)
    cells += [f"{three_digits(r) if r else '-':>{width}}" for width, r in ratios]
    return " ".join([head, *cells])


def three_digits(value: float) -> str:
    """Three significant digits without an exponent, at most three decimals."""
    whole = len(str(int(value))) if value >= 1 else 0
    return f"{value:.{3 - min(3, whole)}f}"


def describe(about: Mapping[str, Any]) -> str:
    """The header of a run: the device, how it was measured, what is compared."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines = [
        f"device    {about['device']}, {about['target']}, {about['threads']} threads",
        f"versions  {about['date']}, {versions}",
        f"weights   {about['weights']}",
        f"method    {about['method']}",
        f"% read    share of the read bandwidth over as many bytes: {about['bandwidth_method']}",
        "error     of ours against float64; a library whose result is wrong is not timed",
    ]
    lines += [f"peer      {name}: {note}" for name, note in about["peers"].items() if name != OURS]
    if about["missing"]:
        lines.append(f"missing   {', '.join(about['missing'])}")
    return "\n".join(lines)


def slug(text: str) -> str:
    """``text`` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write_json(path: Path, about: Mapping[str, Any], rows: Iterable[Row]) -> None:
    """Writes the run, times in seconds and rates a second."""
    files.write_json(path, {"about": about, "rows": [row.to_json() for row in rows]})
