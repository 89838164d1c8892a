"""Time against M from a JSON file of ``python -m benchmarks.cuda``, with the floor drawn in.

    python -m benchmarks.cuda.plot RESULTS.json [--shape 4096x14336]

The floor of a format on an H200 is the larger of two times: reading its weights once, 2.2 us and
4.46 TB/s (a kernel that only reads, as a graph replay), and the product at 790 TFLOP/s. Writes
RESULTS.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

START_US, BYTES_PER_US, FLOP_PER_US = 2.2, 4.46e6, 790e6
STORED_BITS = {
    "affine3_g64": 3.5,
    "affine4_g64": 4.5,
    "affine8_g64": 8.5,
    "mxfp8": 8.25,
    "nvfp4": 4.5,
}


def floor_us(bits: float, M: int, N: int, K: int) -> float:
    """The least time of a product whose weights have ``bits`` bits each, in microseconds."""
    return max(START_US + N * K * bits / 8 / BYTES_PER_US, 2 * M * N * K / FLOP_PER_US)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--shape", default="4096x14336", help="KxN")
    options = parser.parse_args()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    K, N = (int(n) for n in options.shape.split("x"))
    read = json.loads(options.results.read_text())
    rows = [row for row in read["rows"] if (row["K"], row["N"]) == (K, N)]
    if not rows:
        parser.error(f"{options.results}: no rows of shape {options.shape}")
    figure, axes = plt.subplots(figsize=(8, 5))
    for who in dict.fromkeys(row["who"] for row in rows):
        own = sorted((row["M"], row["us"]) for row in rows if row["who"] == who)
        style = "--" if who not in STORED_BITS else "-"
        (line,) = axes.loglog(*zip(*own, strict=True), style, marker=".", label=who)
        if who in STORED_BITS:
            floors = [floor_us(STORED_BITS[who], M, N, K) for M, _ in own]
            axes.loglog([M for M, _ in own], floors, ":", color=line.get_color(), linewidth=1)
    about = read["about"]
    axes.set(xlabel="M", ylabel="us a call (dotted: floor)")
    axes.set_title(f"{options.shape}, bfloat16, {about['device']}, {about['date']}")
    axes.legend()
    figure.tight_layout()
    target = options.results.with_suffix(".png")
    scratch = target.with_name(target.name + ".part")
    figure.savefig(scratch, format="png", dpi=110)
    scratch.replace(target)


if __name__ == "__main__":
    main()
