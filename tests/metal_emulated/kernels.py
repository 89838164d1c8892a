"""The kernels of kernels/metal on the emulator: instances of a format, and products through them."""

from __future__ import annotations

import faulthandler
import functools
import multiprocessing
import os
import struct
import traceback
from collections.abc import Callable
from typing import Any

import emulator
import mlx.core as mx
import numpy as np
import oracle
from mlx_lowbit import _ext
from mlx_lowbit.formats import Format

# Numbers of kernels/metal/plan.h's Kernel; `quantize` also stands for the other two of its file.
KERNELS = ("matvec", "matmul", "vecmat", "quantize", "dequantize", "round_trip", "group")
ELEMENTS = KERNELS[3:6]


def rows_of_simdgroup(family: str, tokens: int) -> int:
    if family == "matmul":
        return 16 if tokens > 64 else 32
    return 4 if family == "matvec" else 1024


FLOAT_TYPE = {"float32": 0, "float16": 1, "bfloat16": 2}


def name_of(dtype: mx.Dtype) -> str:
    return str(dtype).rpartition(".")[2]


def numbers(family: str) -> list[int]:
    return [KERNELS.index(name) for name in (ELEMENTS if family == "quantize" else [family])]


def tiles(family: str) -> tuple[int, ...]:
    """Tokens of the tiles that there are."""
    entries = _ext.metal_source(numbers(family), 0)[1]
    return tuple(dict.fromkeys(tokens for *_, tokens in entries))


def source(family: str, fmt: Format | None = None) -> str:
    """What the host gives to the compiler, with every instance of a format."""
    return visible(_ext.metal_source(numbers(family), fmt.id if fmt else 0)[0])


def visible(source: str) -> str:
    """The text with names that the emulator's entry points, at its end, can see."""
    return source + "using namespace lowbit;\n"


@functools.lru_cache(maxsize=64)
def library(family: str, fmt: Format | None, kind: emulator.Kind) -> emulator.Library:
    return emulator.compile(source(family, fmt), kind)


def fails(action: Callable[[], None]) -> bool:
    """Whether an assertion of `action` fails, or it ends its process: a wrong kernel may.

    It runs in a process of its own, two minutes at most.

    Raises:
        RuntimeError: another exception, which is printed.
    """

    def run() -> None:
        faulthandler.disable()
        code = 0
        try:
            action()
        except AssertionError:
            code = 1
        except BaseException:
            traceback.print_exc()
            code = 2
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(120)
    process.kill()
    process.join()
    if process.exitcode == 2:
        raise RuntimeError("an exception that is no failed assertion")
    return process.exitcode != 0


def poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """NaN in every float."""
    a = np.empty(shape, dtype)
    a.view(np.uint8).fill(0xFF)
    return a


def product(
    family: str,
    fmt: Format,
    x: np.ndarray,
    w: oracle.Weight,
    tokens: int,
    *,
    simdgroups: int = 2,
    kind: emulator.Kind = "run",
    order: str = "greedy",
    seed: int = 0,
    y_dtype: np.dtype | None = None,
    bias: np.ndarray | None = None,
    global_scale: float | None = None,
    global_scale_x: float | None = None,
    lhs: np.ndarray | None = None,
    rhs: np.ndarray | None = None,
) -> tuple[np.ndarray, emulator.Report]:
    """(y, report) of x [M, K] or, with `rhs` [pairs], x [matrices, M, K] and a stack of w.

    y is [M, N] or [pairs, M, N]. Of `vecmat` w is [K, N].
    """
    gathered = rhs is not None
    stack = x if gathered else x[None]
    x_matrices, M, K = stack.shape
    N = w.words.shape[-1] * 32 // fmt.bits if family == "vecmat" else w.words.shape[-2]
    pairs = len(rhs) if gathered else 1
    matrices = len(w.words) if gathered else 1
    counts = 0 if global_scale is None else 1
    args = struct.pack("<7i", M, N, K, pairs, x_matrices, matrices, counts)
    y = poisoned((pairs, M, N), y_dtype or x.dtype)
    buffers: dict[int, Any] = {0: args, 1: np.ascontiguousarray(x), 2: w.words, 3: w.scales}
    optional = {4: w.biases, 5: bias, 10: y}
    optional[6] = None if global_scale_x is None else np.float32([global_scale_x])
    optional[7] = None if global_scale is None else np.float32([global_scale])
    optional[8] = None if lhs is None else lhs.astype(np.int64)
    optional[9] = None if rhs is None else rhs.astype(np.int64)
    grouped = gathered and family == "matmul"
    tiles_of_tokens = -(-M // tokens)
    if grouped:
        optional[11] = group(optional[9], M, matrices, kind, seed)
        tiles_of_tokens = pairs * M // tokens + matrices + 1
    buffers |= {i: np.ascontiguousarray(a) for i, a in optional.items() if a is not None}
    scale_type = FLOAT_TYPE.get(w.scales.dtype.name, 0)
    constants = {
        0: FLOAT_TYPE[y.dtype.name],
        1: scale_type,
        2: -1 if bias is None else FLOAT_TYPE[bias.dtype.name],
        3: global_scale_x is not None,
        4: global_scale is not None,
        5: gathered,
        6: grouped,
    }
    rows = rows_of_simdgroup(family, tokens) * simdgroups
    dtype = oracle.MLX_DTYPE[x.dtype]
    report = library(family, fmt, kind).launch(
        f"{family}_{fmt.name}_{name_of(dtype)}_{tokens}",
        buffers,
        threadgroups=(-(-N // rows), tiles_of_tokens, 1 if grouped else pairs),
        threads=(32 * simdgroups, 1, 1),
        constants=constants,
        order=order,
        seed=seed,
    )
    return (buffers[10] if gathered else buffers[10][0]), report


def over_groups(
    kernel: str,
    fmt: Format,
    dtype: mx.Dtype,
    buffers: dict[int, Any],
    groups: int,
    *,
    kind: emulator.Kind = "run",
    seed: int = 0,
) -> None:
    """Runs quantize, dequantize or round_trip; the global scale, if any, is buffer 5."""
    chunks = -(-groups * fmt.group_size // 32)
    number = FLOAT_TYPE[name_of(dtype)]
    report = library("quantize", fmt, kind).launch(
        f"{kernel}_{fmt.name}_{name_of(dtype)}",
        {0: struct.pack("<q", groups), **buffers},
        threadgroups=(-(-chunks // 64), 1, 1),
        threads=(64, 1, 1),
        constants={0: number, 1: number, 3: 5 in buffers},
        seed=seed,
    )
    assert report.problems == 0, report.messages


def quantize(
    fmt: Format, w: np.ndarray, global_scale: float | None = None, **launch: Any
) -> oracle.Weight:
    """w [rows, K] as the kernel quantizes it."""
    rows, K = w.shape
    groups = w.size // fmt.group_size
    scale = w.dtype if fmt.has_biases else np.dtype(np.uint8)
    words = poisoned((rows, K * fmt.bits // 32), np.dtype(np.uint32))
    scales = poisoned((rows, K // fmt.group_size), scale)
    biases = poisoned(scales.shape, scale) if fmt.has_biases else None
    buffers = {1: np.ascontiguousarray(w), 2: words, 3: scales}
    if biases is not None:
        buffers[4] = biases
    if global_scale is not None:
        buffers[5] = np.float32([global_scale])
    over_groups("quantize", fmt, oracle.MLX_DTYPE[w.dtype], buffers, groups, **launch)
    return oracle.Weight(words, scales, biases)


def group(rhs: np.ndarray, M: int, matrices: int, kind: emulator.Kind, seed: int = 0) -> np.ndarray:
    """What the `group` kernel writes: rows in order, then where each matrix's begin."""
    out = np.full(len(rhs) * M + matrices + 2, -77, np.int32)
    report = library("group", None, kind).launch(
        "group",
        {0: struct.pack("<3i", M, len(rhs), matrices), 1: rhs, 2: out},
        threadgroups=(1, 1, 1),
        threads=(128, 1, 1),
        seed=seed,
    )
    assert not report.problems, report.messages
    return out
