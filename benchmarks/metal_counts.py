"""``python -m benchmarks --metal-counts``: what Metal kernels read, write and compute, ours and MLX's.

Counted in the emulator of ``tests/metal_emulated``, on this machine, without an Apple GPU. These are
counts, not times: bytes that threads ask device memory for, whether or not a cache has them, and
LLVM's floating-point operations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lowbit import _ext, formats
from mlx_lowbit.formats import Format

ROOT = Path(__file__).parents[1]
# N and K of shapes that take the emulator seconds; what is counted grows with both in proportion.
WIDTHS = ((4096, 4096), (1024, 1024))
OPS = {"quantized_matmul": (1, 4, 16, 128), "qqmm": (1, 16, 512)}
SIZE = "g"  # of the chip: the plain one


class Count(NamedTuple):
    """One kernel on one problem: bytes, operations, barriers."""

    op: str
    format: str
    M: int
    N: int
    K: int
    whose: str
    kernel: str
    read: int
    weights_read: int
    written: int
    operations: int
    barriers: int
    weights: int
    ideal: int

    @property
    def line(self) -> str:
        return (
            f"{self.op:<17} {self.format:<11} {self.M:>4} {self.N:>5} {self.K:>5}  {self.whose:<5} "
            f"{self.kernel:<14} {self.read / 1e6:>9.2f} {self.read / self.ideal:>6.2f} "
            f"{self.weights_read / self.weights:>7.2f} {self.written / 1e6:>8.3f} "
            f"{self.operations / (self.M * self.N * self.K):>8.2f} {self.barriers:>9}"
        )


HEADER = (
    f"{'op':<17} {'format':<11} {'M':>4} {'N':>5} {'K':>5}  {'whose':<5} {'kernel':<14} "
    f"{'read MB':>9} {'/ideal':>6} {'w reads':>7} {'wrote MB':>8} {'flop/MNK':>8} {'barriers':>9}"
)


def _modules() -> tuple[Any, Any, Any]:
    """(kernels, mlx_kernels, oracle) of the tests.

    Raises:
        RuntimeError: what is missing.
    """
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "metal_emulated")]
    import emulator
    import host
    import mlx_kernels
    import oracle

    import kernels

    if reason := emulator.missing():
        raise RuntimeError(reason)
    host.wheel()
    return kernels, mlx_kernels, oracle


def _mlx_kernel(op: str, M: int) -> str:
    """As MLX dispatches on a chip of the fifteenth generation or later, aligned shapes."""
    if M == 1:
        return "qmv_fast"
    return "qmv_wide" if op == "qqmm" or M < 13 else "qmm_t"


def _ours(kernels: Any, op: str, fmt: Format, x: np.ndarray, w: Any, N: int) -> Iterator[Any]:
    """(entry, report) of each launch; the second of `count` libraries."""
    M, K = x.shape
    quantize_x = op == "qqmm"
    _, kernel, tokens, simdgroups, _ = _ext.metal_plan(
        fmt.id, 2, M, N, K, quantize_x=quantize_x, size=SIZE
    )
    for kind in ("check", "count"):
        yield (
            kernels.KERNELS[kernel],
            kernels.product(
                kernels.KERNELS[kernel], fmt, x, w, tokens, simdgroups=simdgroups, kind=kind
            )[1],
        )


def measure(
    shapes: tuple[tuple[int, int], ...] = WIDTHS,
    names: tuple[str, ...] = ("affine4_g64", "mxfp8", "nvfp4"),
) -> Iterator[Count]:
    """Counts of ours and of MLX's, problem by problem."""
    kernels, mlx_kernels, oracle = _modules()
    for fmt in (f for f in formats.FORMATS if f.name in names):
        for op, rows in OPS.items():
            if op == "qqmm" and fmt.mode not in ("mxfp8", "nvfp4"):
                continue
            for M in rows:
                N, K = shapes[0] if M <= 16 and op == "quantized_matmul" else shapes[-1]
                yield from _problem(kernels, mlx_kernels, oracle, op, fmt, M, N, K)


def _problem(
    kernels: Any, mlx_kernels: Any, oracle: Any, op: str, fmt: Format, M: int, N: int, K: int
) -> Iterator[Count]:
    case = mlx_kernels.Case(
        fmt.mode, fmt.bits, fmt.group_size, _mlx_kernel(op, M), mx.bfloat16, M, N, K
    )
    x, parts, _ = mlx_kernels.operands(case)
    w = oracle.Weight(parts[0], parts[1], parts[2] if len(parts) > 2 else None)
    weights = sum(p.nbytes for p in parts)
    ideal = weights + x.nbytes + 2 * M * N

    def row(whose: str, name: str, bytes_of: Any, arithmetic: Any, of_w: tuple[int, ...]) -> Count:
        read = {i: n for i, n in bytes_of.read.items()}
        return Count(
            op, fmt.name, M, N, K, whose, name, sum(read.values()), sum(read[i] for i in of_w),
            sum(bytes_of.written.values()), arithmetic.arithmetic, bytes_of.barriers, weights, ideal,
        )  # fmt: skip

    (name, checked), (_, counted) = _ours(kernels, op, fmt, x, w, N)
    yield row("ours", name, checked, counted, (2, 3, 4))
    launched = [
        mlx_kernels.launch(case, mlx_kernels.library((case,), kind), case.name, x, parts)[1]
        for kind in ("check", "count")
    ]
    # The third buffer of the block modes is no weight.
    yield row("MLX", case.kernel, *launched, (0, 1, 2) if fmt.has_biases else (0, 1))


def main() -> str | None:
    """Prints the table, or returns what it needs that is missing here."""
    print("Counted in an emulator: bytes that threads ask for and operations, not times.")
    print("x and y in bfloat16; quantizing x is not counted, on either side.")
    print("/ideal: bytes read over weights + x + y; w reads: weight bytes read over their size.")
    print(HEADER)
    try:
        for count in measure():
            print(count.line, flush=True)
    except RuntimeError as error:
        return str(error)
    return None
