"""Time against M, a panel a format, with the floor drawn in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.baselines import INT8, OURS
from benchmarks.measure import Row


def write(
    path: Path, about: Mapping[str, Any], rows: Sequence[Row], formats: Sequence[str]
) -> bool:
    """Draws the products of the first shape and dtype that were timed at several M.

    Args:
        path: of the PNG file; the name appears with the whole file.
        about: the run, as in the JSON file.
        rows: all rows.
        formats: names of the formats to draw; all where none of these was timed.

    Returns:
        whether a file was written: False without matplotlib or without rows to draw.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return False
    drawn = _choose(rows, formats)
    if not drawn:
        return False
    panels = list(dict.fromkeys(row.case.format for row in drawn))
    across = min(3, len(panels))
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down,
        across,
        figsize=(4.4 * across, 3.4 * down + 1.2),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    colors = {name: f"C{i % 10}" for i, name in enumerate(about["peers"])}
    rate = _best_rate(drawn)
    for axis, name in zip(axes.flat, panels, strict=False):
        _draw(axis, [row for row in drawn if row.case.format == name], colors, rate)
        axis.set_title(name, fontsize=10)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("ms")
    case = drawn[0].case
    figure.suptitle(
        f"x[M, {case.shape.k}] @ w[{case.shape.n}, {case.shape.k}].T, {case.dtype} activations, "
        f"weights {about['weights'].split(':')[0]}\n{about['device']}, {about['target']}, "
        f"{about['threads']} threads, {about['date'][:10]}",
        fontsize=10,
    )
    lines: dict[str, Any] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        lines |= dict(zip(labels, handles, strict=True))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=6, fontsize=8)
    temporary = path.with_name(path.name + ".part")
    figure.savefig(temporary, format="png", dpi=110)
    os.replace(temporary, path)
    pyplot.close(figure)
    return True


def _choose(rows: Sequence[Row], formats: Sequence[str]) -> list[Row]:
    """The rows of one shape and dtype, M ascending; empty if none was timed at several M."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.case.op in ("matvec", "matmul") and row.ours:
            groups.setdefault((row.case.shape.name, row.case.dtype), []).append(row)
    several = (g for g in groups.values() if len({row.case.m for row in g}) > 1)
    chosen = sorted(next(several, []), key=lambda row: row.case.m)
    return [row for row in chosen if row.case.format in formats] or chosen


def _best_rate(rows: Sequence[Row]) -> float:
    """The most multiplications and additions a second that any library reached, int8 ones apart."""
    return max(
        row.case.flops / timing.median
        for row in rows
        for name, timing in row.timings.items()
        if not name.endswith(INT8)
    )


def _draw(axis: Any, rows: Sequence[Row], colors: Mapping[str, str], rate: float) -> None:
    for name, color in colors.items():
        points = [
            (row.case.m, row.timings[name].median * 1e3) for row in rows if name in row.timings
        ]
        if points:
            width = 2.6 if name == OURS else 1.1
            axis.plot(*zip(*points, strict=True), "o-", ms=3, lw=width, color=color, label=name)
    # Reading the packed weights once, or multiplying at the best rate seen, whichever is longer.
    floor = [max(row.nbytes / row.bandwidth, row.case.flops / rate) * 1e3 for row in rows]
    label = "floor: reading w once, or the best GFLOP/s here"
    axis.plot([row.case.m for row in rows], floor, "k--", lw=1, label=label)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks([row.case.m for row in rows], [str(row.case.m) for row in rows])
    axis.grid(alpha=0.3)
    axis.set_xlabel("M", fontsize=8)
