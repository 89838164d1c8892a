"""Our kernels and MLX's own, timed beside each other on this machine: ``doctor --tune``.

What was measured is kept in the user's cache, in one file for each device and build. On Metal,
where no figure of ours exists, ``auto`` runs a kernel of ours only where this file has it faster;
on CPUs and NVIDIA GPUs the file is for reading alone.
"""

from __future__ import annotations

import datetime
import functools
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

from . import _ext, ops, selftest
from .backend import Backend, get_backend, set_backend
from .formats import FORMATS, Format

# (K, N) and rows of x.
SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096))
ROWS = (1, 2, 4, 8, 16, 32, 64, 256, 1024)
OPS = ("quantized_matmul", "qqmm")
# Ours must be so much faster that noise does not decide, and a point so near to a problem, as a
# power of two of rows and of weights, to speak of it.
MARGIN, NEAR = 0.97, (1.0, 3.0)
# Weights of one turn, so that caches do not hold them, and the seconds after which larger
# problems of a series are left out.
TURN_BYTES, PATIENCE = 256 << 20, 0.5


class Row(NamedTuple):
    """Microseconds a call, medians of turns."""

    op: str
    format: str
    M: int
    N: int
    K: int
    ours: float
    mlx: float


class Failed(NamedTuple):
    """A case that has no figure: its kernel was refused by the device's compiler, or is wrong."""

    op: str
    format: str
    M: int
    N: int
    K: int
    words: str


class Measured:
    """What a file says of a device."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            self.rows.setdefault((row.op, row.format), []).append(row)

    def slower(self, op: str, fmt: str, M: int, weights: int) -> str | None:
        """Why MLX's op had better run, or None where ours was measured to be faster.

        Args:
            M: rows of x; ``weights``: elements of w.
        """

        def distance(row: Row) -> tuple[float, float]:
            return abs(math.log2(M / row.M)), abs(math.log2(weights / (row.N * row.K)))

        rows = self.rows.get((op, fmt), [])
        if M <= 0 or weights <= 0 or not rows:
            return "doctor --tune has not measured it here"
        row = min(rows, key=lambda row: math.hypot(*distance(row)))
        if any(far > near for far, near in zip(distance(row), NEAR, strict=True)):
            return "doctor --tune has measured nothing near it here"
        if row.ours > MARGIN * row.mlx:
            return (
                f"doctor --tune found MLX's no slower here (M={row.M}, N={row.N}, K={row.K}: "
                f"{row.ours:.0f} us ours, {row.mlx:.0f} us MLX's)"
            )
        return None


def cache_directory() -> Path:
    """``MLX_LOWBIT_CACHE``, or mlx_lowbit in the user's cache directory."""
    if named := os.environ.get("MLX_LOWBIT_CACHE"):
        return Path(named)
    if platform.system() == "Darwin":
        return Path.home() / "Library" / "Caches" / "mlx_lowbit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_lowbit"


def device_name(device: mx.Device | None = None) -> str:
    """The device's own name; of the CPU the instruction set that is used."""
    device = mx.default_device() if device is None else device
    if device.type == mx.cpu:
        return f"cpu {_ext.target()} {_ext.threads()} threads"
    return str(mx.device_info(device).get("device_name", device))


def build_name() -> str:
    """Whose kernels were measured: another version's figures say nothing of these."""
    from . import __version__

    return f"mlx-lowbit {__version__}, {_ext.build}"


def path(device: mx.Device | None = None) -> Path:
    """The file of a device."""
    words = "".join(c if c.isalnum() else "-" for c in device_name(device).lower())
    return cache_directory() / f"measured-{words}.json"


@functools.lru_cache(maxsize=8)
def read(file: Path) -> Measured:
    """What `file` says; nothing where it is missing, damaged or of another build.

    Kept for the life of the process: :func:`write` makes it be read again.
    """
    try:
        document = json.loads(file.read_text())
        if document["build"] != build_name():
            return Measured([])
        return Measured([Row(**row) for row in document["rows"]])
    except (OSError, ValueError, KeyError, TypeError):
        return Measured([])


def write(rows: Sequence[Row], device: mx.Device | None = None) -> Path:
    """Replaces the file of a device, in one step."""
    file = path(device)
    document = {
        "device": device_name(device),
        "date": str(datetime.date.today()),
        "build": build_name(),
        "rows": [row._asdict() for row in rows],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as temporary:
        json.dump(document, temporary, indent=1)
    os.replace(temporary.name, file)
    read.cache_clear()
    return file


def measure(
    formats: Sequence[Format] | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    dtype: mx.Dtype = mx.bfloat16,
) -> Iterator[Row | Failed]:
    """A row for each op, format, shape (K, N) and number of rows of x, on the default device.

    A kernel that is refused or wrong has no figure, so that ``auto`` does not choose it. Where
    there is no kernel of ours, or MLX has no such op, there is no row.
    """
    before = get_backend()
    try:
        for fmt in formats or [f for f in FORMATS if f.judged]:
            for K, N in shapes:
                for op in OPS if fmt.mode in ops.ACTIVATION_MODES else OPS[:1]:
                    yield from _series(op, fmt, K, N, rows, dtype)
    finally:
        set_backend(before)


def _series(
    op: str, fmt: Format, K: int, N: int, rows: Sequence[int], dtype: mx.Dtype
) -> Iterator[Row | Failed]:
    keywords = {"mode": fmt.mode, "bits": fmt.bits, "group_size": fmt.group_size}
    w = mx.quantize((mx.random.normal((N, K)) * 0.02).astype(dtype), **keywords)
    copies = min(16, max(1, TURN_BYTES // sum(a.nbytes for a in w)))
    weights = [[mx.array(a) for a in w] for _ in range(copies)]
    mx.eval(weights)
    error_of = _errors(op, fmt, weights[0])
    for M in sorted(rows):
        x = mx.random.normal((M, K)).astype(dtype)
        case = (op, fmt.name, M, N, K)

        def product(one: list[mx.array], x: mx.array = x) -> mx.array:
            return getattr(ops, op)(x, *one, **keywords)

        try:
            set_backend("lowbit")
            error = error_of(x, product(weights[0]))
            if not error <= selftest.product_bound(dtype, K):
                yield Failed(*case, f"wrong, relative error {error:.2g}")
                continue
            ours, mlx = _turns(product, weights)
        except _ext.KernelRefused as refusal:  # other numbers of rows have other kernels
            yield Failed(*case, str(refusal))
            continue
        except (ValueError, RuntimeError):
            return
        yield Row(*case, 1e6 * ours, 1e6 * mlx)
        if max(ours, mlx) * copies > PATIENCE:
            return


def _errors(op: str, fmt: Format, w: list[mx.array]) -> Callable[[mx.array, mx.array], float]:
    """The relative error of y = x @ w^T, against float64, on some of the rows of x and of w.

    Rows lie an odd number apart: they meet every place of the tiles that kernels work in.
    """
    every = w[0].shape[0] // 64 | 1
    dense = selftest.decode(fmt, *(a[::every] for a in w))
    dense = dense.reshape(len(dense), -1)

    def error_of(x: mx.array, y: mx.array) -> float:
        some = x.shape[0] // 16 | 1
        x = x[::some]
        if op == "qqmm":
            parts = ops.quantize(x, mode=fmt.mode, bits=fmt.bits, group_size=fmt.group_size)
            values = selftest.decode(fmt, *parts).reshape(x.shape)
        else:
            values = selftest.f64(x)
        return selftest.relative_error(y[::some, ::every], values @ dense.T)

    return error_of


def _turns(
    product: Callable[[list[mx.array]], mx.array], weights: list[list[mx.array]]
) -> tuple[float, float]:
    """Seconds a call of ours and of MLX's, by turns over all weights."""
    times: dict[Backend, list[float]] = {"lowbit": [], "mlx": []}
    for turn in range(6):
        for backend, of_backend in times.items():
            set_backend(backend)
            begin = time.perf_counter()
            mx.eval([product(one) for one in weights])
            of_backend.append((time.perf_counter() - begin) / len(weights))
        if turn > 0 and max(of[-1] for of in times.values()) * len(weights) > PATIENCE:
            break
    # The first turn compiles.
    return statistics.median(times["lowbit"][1:]), statistics.median(times["mlx"][1:])


def table(rows: Sequence[Row]) -> str:
    """The rows in columns."""
    lines = [f"{'op':<17} {'format':<12} {'K':>6} {'N':>6} {'M':>5} {'ours us':>9} {'MLX us':>9}"]
    for row in rows:
        lines.append(
            f"{row.op:<17} {row.format:<12} {row.K:>6} {row.N:>6} {row.M:>5} {row.ours:>9.1f} "
            f"{row.mlx:>9.1f}  {row.mlx / row.ours:.2f}x"
        )
    return "\n".join(lines)
