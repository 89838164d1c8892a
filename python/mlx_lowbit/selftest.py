"""Every op and format of this installation against float64, on one device: ``doctor`` runs it.

The reference decodes the packed bits by itself, in numpy: a fault that kernels share with each
other, or with MLX, is seen all the same. Bounds are those of the README's section on numerics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from . import ops
from .backend import get_backend, set_backend
from .formats import FORMATS, Format

DTYPES = (mx.float32, mx.float16, mx.bfloat16)
ROWS = (1, 2, 3, 7, 15, 17, 70)  # of x: those of every kind of kernel
N, EXPERTS = 41, 3
ROUNDOFF = {mx.float32: 2.0**-24, mx.float16: 2.0**-11, mx.bfloat16: 2.0**-8}
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


class Result(NamedTuple):
    """One op in one format and dtype.

    Attributes:
        error: the largest relative error in the Frobenius norm, nan for a NaN in a result.
        bound: what it may be; 0 asks for equality.
        reason: why the op did not run, or an empty string.
    """

    op: str
    format: str
    dtype: str
    error: float
    bound: float
    reason: str = ""

    @property
    def ok(self) -> bool:
        return not self.reason and self.error <= self.bound


def decode(
    fmt: Format, w: mx.array, scales: mx.array, biases: mx.array | None = None
) -> np.ndarray:
    """float64 [..., K] of codes uint32 [..., K * bits / 32], without a global scale."""
    words = np.ascontiguousarray(np.array(w))
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    codes = bits.reshape(*words.shape[:-1], -1, fmt.bits) @ (1 << np.arange(fmt.bits))
    if fmt.has_biases:
        return _by_group(fmt, codes) * f64(scales)[..., None] + f64(biases)[..., None]
    elements, steps, _ = BLOCKS[fmt.mode]
    return _by_group(fmt, elements[codes]) * steps[np.array(scales)][..., None]


def _e4m3() -> np.ndarray:
    """Values of all codes of e4m3: exponent bias 7, no infinity, two NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    values = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values[127] = np.nan
    return np.concatenate([values, -values])


E4M3, E8M0 = _e4m3(), 2.0 ** (np.arange(256.0) - 127)
# Values of element codes and of scale bytes, and the share of a value that a code may miss it by.
BLOCKS = {
    "mxfp4": (E2M1, E8M0, 2.0**-2),
    "nvfp4": (E2M1, E4M3, 2.0**-2),
    "mxfp8": (E4M3, E8M0, 2.0**-4),
}


def _by_group(fmt: Format, values: np.ndarray) -> np.ndarray:
    return values.reshape(*values.shape[:-1], -1, fmt.group_size)


def f64(a: mx.array | None) -> np.ndarray:
    """Values of floats."""
    assert a is not None
    return np.array(a.astype(mx.float32)).astype(np.float64)


class _Case:
    """Random operands of a format in a dtype, and their products in float64."""

    def __init__(self, fmt: Format, dtype: mx.Dtype) -> None:
        self.fmt, self.dtype = fmt, dtype
        self.keywords = {"mode": fmt.mode, "bits": fmt.bits, "group_size": fmt.group_size}
        self.K = K = 3 * max(fmt.group_size, 32)
        key = mx.random.key(fmt.id)
        self.dense = mx.random.normal((EXPERTS, N, K), key=key).astype(dtype)
        self.stack = ops.quantize(self.dense, **self.keywords)
        self.one = [None if a is None else a[0] for a in self.stack]
        self.rows = mx.random.normal((max(ROWS), K), key=key).astype(dtype)
        self.values = decode(fmt, *self.stack).reshape(EXPERTS, N, K)

    def quantized_rows(self) -> np.ndarray:
        codes, scales, _ = ops.quantize(self.rows, **self.keywords)
        return decode(self.fmt, codes, scales).reshape(self.rows.shape)

    def products(self, op: str) -> float:
        """The largest error of an op over row counts, and over experts."""
        w, scales, biases = self.stack if op.startswith("gather") else self.one
        x = self.quantized_rows() if "qqmm" in op else f64(self.rows)
        more = {} if "qqmm" in op else {"biases": biases}
        errors = []
        for M in ROWS:
            if op.startswith("gather"):
                chosen = np.arange(M) * 7 % EXPERTS
                y = getattr(ops, op)(
                    self.rows[:M, None],
                    w,
                    scales,
                    rhs_indices=mx.array(chosen),
                    **more,
                    **self.keywords,
                )[:, 0]
                want = np.einsum("mk,mnk->mn", x[:M], self.values[chosen])
            else:
                y = getattr(ops, op)(self.rows[:M], w, scales, **more, **self.keywords)
                want = x[:M] @ self.values[0].T
            errors.append(relative_error(y, want))
        return float(np.max(errors))  # NaN if one is


def product_bound(dtype: mx.Dtype, K: int) -> float:
    """The relative error that a product over K may have: the README's, K below 2048 as 2048."""
    return 1e-6 * max(K / 2048, 1.0) ** 0.5 if dtype == mx.float32 else ROUNDOFF[dtype]


def relative_error(y: mx.array, want: np.ndarray) -> float:
    """In the Frobenius norm; nan where y has one."""
    return float(np.linalg.norm(f64(y) - want) / np.linalg.norm(want))


def _checks(case: _Case) -> Iterator[tuple[str, float, Callable[[], float]]]:
    """(op, bound, what computes its error)."""
    codes, scales, biases = case.one
    back = case.values[0].astype(np.float32)

    def dequantize() -> float:
        got = ops.dequantize(codes, scales, biases, dtype=mx.float32, **case.keywords)
        return relative_error(got, back.astype(np.float64))

    def quantize() -> float:
        want = f64(case.dense)
        return float(np.linalg.norm(case.values - want) / np.linalg.norm(want))

    # Of normal values in affine steps less than two of them, and what rounding scales takes.
    missed = 2.0 ** (1 - case.fmt.bits) if case.fmt.has_biases else BLOCKS[case.fmt.mode][2]
    yield "quantize", missed + ROUNDOFF[case.dtype], quantize
    yield "dequantize", 2.0**-23, dequantize
    names = ["quantized_matmul", "gather_qmm"]
    if case.fmt.mode in ops.ACTIVATION_MODES:
        names += ["qqmm", "gather_qqmm"]
    for name in names:
        yield name, product_bound(case.dtype, case.K), lambda name=name: case.products(name)


def run(
    formats: tuple[Format, ...] = FORMATS, dtypes: tuple[mx.Dtype, ...] = DTYPES
) -> Iterator[Result]:
    """Results on the default device, one an op, format and dtype, as they come.

    Kernels of ours are asked for; where there is none the result's reason says why. An op that
    raises is a result too, with the message as its reason.
    """
    before = get_backend()
    set_backend("lowbit")
    try:
        for fmt in formats:
            for dtype in dtypes:
                yield from _results(fmt, dtype)
    finally:
        set_backend(before)


def _results(fmt: Format, dtype: mx.Dtype) -> Iterator[Result]:
    name = str(dtype).rpartition(".")[2]
    try:
        case = _Case(fmt, dtype)
    except (ValueError, RuntimeError) as error:
        yield Result("quantize", fmt.name, name, np.nan, 0.0, str(error))
        return
    for op, bound, error_of in _checks(case):
        try:
            yield Result(op, fmt.name, name, error_of(), bound)
        except (ValueError, RuntimeError) as error:
            yield Result(op, fmt.name, name, np.nan, bound, str(error))
