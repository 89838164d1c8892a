"""MLX's own quantized Metal kernels, out of its wheel, in the emulator: what ours are compared with.

The kernels are included from the wheel (``host.wheel``); nothing of MLX is kept here.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import emulator
import host
import mlx.core as mx
import numpy as np
import oracle

import kernels

HERE = Path(__file__).parent
HEADERS = ("utils.h", "defines.h", "steel/gemm/gemm.h", "quantized_utils.h")
METAL = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat"}
# Rows of x that a threadgroup of qmv_wide takes at most, as MLX dispatches it.
WIDE = 5


class Case(NamedTuple):
    """One of MLX's kernels on x [M, K] and w [N, K].

    `kernel` is qmv_fast, qmv, qmv_wide, qmm_t, or qmm_t_unaligned where N is not a multiple of 32.
    """

    mode: str
    bits: int
    group_size: int
    kernel: str
    dtype: mx.Dtype
    M: int
    N: int
    K: int

    @property
    def name(self) -> str:
        dtype = str(self.dtype).rpartition(".")[2]
        return f"{self.mode}_{self.kernel}_{dtype}_{self.bits}_{self.group_size}_{self.vectors}"

    @property
    def keywords(self) -> dict:
        return {"mode": self.mode, "bits": self.bits, "group_size": self.group_size}

    @property
    def vectors(self) -> int:
        """Rows of x that share a read of w."""
        if self.kernel == "qmv_wide":
            return -(-self.M // -(-self.M // WIDE))
        return 32 if self.kernel.startswith("qmm") else 1

    @property
    def k_lanes(self) -> int:
        """Lanes of qmv_wide that share a row of w."""
        return 8 if self.mode == "affine" else 16

    def apple_name(self) -> str:
        """The entry point in mlx.metallib."""
        dtype = {"float32": "float", "float16": "float16_t", "bfloat16": "bfloat16_t"}
        own = dtype[str(self.dtype).rpartition(".")[2]]
        base = f"{self.mode}_{self.kernel.removesuffix('_unaligned')}_{own}"
        base += f"_gs_{self.group_size}_b_{self.bits}"
        if self.kernel.startswith("qmm"):
            return f"{base}_alN_{str(self.kernel == 'qmm_t').lower()}_batch_0"
        return f"{base}_batch_0_pr_0_hgs_0_r_4"


def _header(mode: str) -> str:
    return "quantized.h" if mode == "affine" else "fp_quantized.h"


def _instance(case: Case) -> str:
    prefix = "affine" if case.mode == "affine" else "fp"
    types = f"{METAL[case.dtype]}, {case.group_size}, {case.bits}"
    function = f"{prefix}_{case.kernel.removesuffix('_unaligned')}"
    if case.kernel == "qmv_wide":
        return f'instantiate_kernel("{case.name}", {function}, {types}, {case.vectors}, {case.k_lanes}, 0)'
    aligned = {"qmm_t": "true, ", "qmm_t_unaligned": "false, "}.get(case.kernel, "")
    return f'instantiate_kernel("{case.name}", {function}, {types}, {aligned}false)'


@functools.cache
def library(cases: tuple[Case, ...], kind: emulator.Kind) -> emulator.Library:
    """Cases of one header."""
    folder = "mlx/backend/metal/kernels/"
    lines = ["#include <metal_simdgroup>", "#include <metal_stdlib>", "using namespace metal;"]
    lines += [f'#include "{folder}{name}"' for name in (*HEADERS, _header(cases[0].mode))]
    lines += dict.fromkeys(map(_instance, cases))
    include = [HERE / "overlay", host.wheel() / "include"]
    return emulator.compile("\n".join(lines) + "\n", kind, include=include)


def operands(case: Case) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """x, the parts of w, and their exact product."""
    mx.random.seed(case.M + case.N)
    w = mx.random.normal((case.N, case.K)).astype(case.dtype) * 0.1
    x = mx.random.normal((case.M, case.K)).astype(case.dtype)
    parts = mx.quantize(w, **case.keywords)
    dense = mx.dequantize(*parts, dtype=mx.float32, **case.keywords)

    def wide(a: mx.array) -> np.ndarray:
        return np.array(a.astype(mx.float32)).astype(np.float64)

    arrays = [oracle.to_numpy(p) for p in parts]
    return oracle.to_numpy(x), arrays, wide(x) @ wide(dense).T


def launch(
    case: Case, loaded: emulator.Library, entry: str, x: np.ndarray, parts: list[np.ndarray],
    **options,
) -> tuple[np.ndarray, emulator.Report]:  # fmt: skip
    """(y, report) of one product, with the buffers and the grid that MLX gives it."""
    y = kernels.poisoned((case.M, case.N), x.dtype)
    # Block modes have the global scale in the biases' place; qmv_wide has none.
    third = [parts[2] if len(parts) > 2 else np.ones(1, np.float32)]
    if case.kernel == "qmv_wide" and len(parts) == 2:
        third = []
    sizes = [case.K, case.N] + ([case.M] if case.kernel not in ("qmv", "qmv_fast") else [])
    arrays = [*parts[:2], *third, x, y, *(np.int32([size]) for size in sizes)]
    # One batch: its shapes and strides are not read.
    for _ in "xw":
        arrays += [np.int32([0]), np.zeros(4, np.int32), np.zeros(4, np.int64)]
    arrays += [np.zeros(4, np.int64), np.zeros(4, np.int64)]
    if case.kernel[:3] == "qmm":
        grid, threads = (-(-case.N // 32), -(-case.M // 32), 1), (32, 2, 2)
    elif case.kernel == "qmv_wide":
        rows = 2 * 32 // case.k_lanes
        grid, threads = (-(-case.M // case.vectors), -(-case.N // rows), 1), (32, 2, 1)
    else:
        grid, threads = (case.M, -(-case.N // 8), 1), (32, 2, 1)
    report = loaded.launch(
        entry, dict(enumerate(arrays)), threadgroups=grid, threads=threads, **options
    )
    return y, report
