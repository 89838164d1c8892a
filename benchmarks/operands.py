"""The arrays of a case and what its result must be, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np
import oracle
from mlx_lowbit import ops
from mlx_lowbit.formats import Format

from benchmarks.cases import Case, Shape

T = TypeVar("T")

# Largest relative Frobenius error of ours: rounding of the result for 16-bit types, float32
# accumulation otherwise.
BOUNDS = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float32": 1e-6}
# Rows of w that are decoded and compared: enough to meet each kind of tile, few enough for the
# decode to take milliseconds.
CHECKED_ROWS = 96
# mlx-lm sorts the rows of a mixture by expert from this many on.
SORTED_FROM = 64


@dataclass
class Weights:
    """The weights of one layer and what libraries made of them.

    ``packed`` is (w_q uint32 [N, K * bits / 32], scales [N, K / group_size]) and for affine formats
    the biases, with a leading axis of experts where the shape has some; empty for a dense layer.
    """

    shape: Shape
    dtype: mx.Dtype
    stored: Format | None
    source: mx.array  # [N, K] or [experts, N, K], before quantization
    packed: tuple[mx.array, ...] = ()
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def format(self) -> Format:
        """The format of ``packed``; a dense layer has none and must not be asked."""
        assert self.stored is not None
        return self.stored

    @property
    def keywords(self) -> dict[str, Any]:
        """Mode, bits and group size as MLX's functions take them."""
        f = self.format
        return {"mode": f.mode, "bits": f.bits, "group_size": f.group_size}

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and biases, or of the dense matrix."""
        return sum(a.nbytes for a in self.packed or (self.source,))

    @property
    def dense(self) -> mx.array:
        """The values that the packed weights stand for, in ``dtype``."""
        return self.once("dense", self._dequantize) if self.packed else self.source

    def _dequantize(self) -> mx.array:
        # MLX's own function, so that a fault of ours cannot hide in both sides of a comparison.
        w, scales, *rest = self.packed
        biases = rest[0] if rest else None
        dense = mx.dequantize(w, scales, biases, **self.keywords).astype(self.dtype)
        mx.eval(dense)
        return dense

    def once(self, key: str, make: Callable[[], T]) -> T:
        """A library's own form of these weights: ``make()`` when first asked for ``key``."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def copies(self, count: int, *, sources: bool) -> list[Weights]:
        """``count`` times the same weights at other addresses; ``sources``: the unquantized too.

        Copies are kept, with what libraries make of them, for the next case.
        """
        kept: list[Weights] = self.once(f"copies/{sources}", list)
        while len(kept) < count:
            source = _copy(self.source) if sources or not self.packed else self.source
            packed = tuple(_copy(a) for a in self.packed)
            kept.append(Weights(self.shape, self.dtype, self.stored, source, packed))
        return kept[:count]


@dataclass(frozen=True)
class Inputs:
    """What a case multiplies: ``x`` [M, K], or for experts as mlx-lm shapes it.

    Experts: x [M, 1, 1, K] with ``experts`` uint32 [M, top_k]; where ``sorted``, x
    [M * top_k, 1, K] with ``experts`` [M * top_k].
    """

    x: mx.array
    experts: mx.array | None = None
    sorted: bool = False

    def astype(self, dtype: mx.Dtype) -> Inputs:
        """The same inputs with x in another dtype."""
        x = self.x.astype(dtype)
        mx.eval(x)
        return Inputs(x, self.experts, self.sorted)


def make_weights(shape: Shape, dtype: str, fmt: Format | None, seed: int) -> Weights:
    """Normal weights of standard deviation 0.02, quantized to ``fmt``; dense with None."""
    source = _source(shape, dtype, seed)
    weights = Weights(shape, source.dtype, fmt, source)
    if fmt is not None:
        made = ops.quantize(source, **weights.keywords)
        weights.packed = tuple(a for a in made if a is not None)
        mx.eval(weights.packed)
    return weights


@lru_cache(maxsize=1)
def _source(shape: Shape, dtype: str, seed: int) -> mx.array:
    mx.random.seed(seed)
    size = (shape.experts,) * bool(shape.experts) + (shape.n, shape.k)
    source = (0.02 * mx.random.normal(size)).astype(getattr(mx, dtype))
    mx.eval(source)
    return source


def make_inputs(case: Case, seed: int) -> Inputs:
    """Normal activations and, for experts, ``top_k`` different ones a token."""
    rng = np.random.default_rng(seed)
    m, shape = max(1, case.m), case.shape
    values = rng.standard_normal((m, shape.k), dtype=np.float32)
    x = mx.array(values).astype(getattr(mx, case.dtype))
    if not shape.experts:
        mx.eval(x)
        return Inputs(x)
    chosen = np.stack([rng.permutation(shape.experts)[: shape.top_k] for _ in range(m)])
    if chosen.size < SORTED_FROM:
        inputs = Inputs(x[:, None, None, :], mx.array(chosen.astype(np.uint32)))
    else:
        order = np.argsort(chosen, axis=None, kind="stable")
        rows = mx.array(order // shape.top_k)
        inputs = Inputs(
            x[rows][:, None, :], mx.array(chosen.reshape(-1)[order].astype(np.uint32)), True
        )
    mx.eval(inputs.x, inputs.experts)
    return inputs


def moved_bytes(case: Case, weights: Weights, inputs: Inputs) -> int:
    """Bytes that GB/s counts: the packed weights with scales and biases, of the chosen experts
    only; for quantize and dequantize the dense side as well.
    """
    if case.op in ("quantize", "dequantize"):
        return weights.nbytes + weights.source.nbytes
    if inputs.experts is None:
        return weights.nbytes
    return weights.nbytes // case.shape.experts * len(np.unique(np.array(inputs.experts)))


def to_float64(result: Any) -> np.ndarray:
    """A result of any of the libraries as float64 [rows, N]."""
    if hasattr(result, "detach"):
        result = result.detach().float().numpy()
    return oracle.f64(result).reshape(-1, result.shape[-1])


class Reference:
    """What a case must give, for some columns of the result (rows of w), decoded and multiplied in
    float64.
    """

    def __init__(self, case: Case, weights: Weights, inputs: Inputs, seed: int) -> None:
        self._case = case
        n = case.shape.n
        inner = np.random.default_rng(seed).permutation(n)[: CHECKED_ROWS - 2]
        self._columns = np.unique(np.concatenate([[0, n - 1], inner]))
        if case.op == "quantize":
            self._packed = oracle.encode(weights.format, self._rows(weights.source))
        elif case.op == "dequantize":
            self._expected = self._decode(weights)
        else:
            self._expected = self._multiply(weights, inputs)

    @property
    def bound(self) -> float:
        """The largest error that ours may have: 0 for quantize, which is defined bit by bit."""
        if self._case.op == "quantize":
            return 0.0
        grown = math.sqrt(self._case.shape.k / 2048) if self._case.dtype == "float32" else 1.0
        return BOUNDS[self._case.dtype] * max(1.0, grown)

    def error(self, result: Any) -> float:
        """Relative Frobenius error, NaN counted as infinite; for quantize the share of words,
        scales or biases that differ.
        """
        if self._case.op == "quantize":
            expected = (a for a in self._packed if a is not None)
            pairs = zip(result, expected, strict=True)
            bits = oracle.bits_of
            return max(float(np.mean(bits(self._rows(a)) != bits(b))) for a, b in pairs)
        got = to_float64(result)
        got = got[self._columns] if self._case.op == "dequantize" else got[:, self._columns]
        error = float(np.linalg.norm(got - self._expected) / np.linalg.norm(self._expected))
        return error if error == error else math.inf

    def _rows(self, a: mx.array, expert: int | None = None) -> np.ndarray:
        """The checked rows of an array [N, ...] or [experts, N, ...]."""
        return oracle.to_numpy((a if expert is None else a[expert])[mx.array(self._columns)])

    def _decode(self, weights: Weights, expert: int | None = None) -> np.ndarray:
        """The checked rows of w, float64 [rows, K]."""
        if not weights.packed:
            return oracle.f64(self._rows(weights.source))
        packed = oracle.Weight(*(self._rows(a, expert) for a in weights.packed))
        return oracle.decode(weights.format, packed)

    def _multiply(self, weights: Weights, inputs: Inputs) -> np.ndarray:
        x = to_float64(inputs.x)
        if self._case.op == "qqmm":
            quantized = oracle.encode(weights.format, oracle.to_numpy(inputs.x))
            x = oracle.decode(weights.format, quantized)
        if inputs.experts is None:
            return x @ self._decode(weights).T
        chosen = np.array(inputs.experts).reshape(-1)
        tokens = np.arange(len(chosen)) // (len(chosen) // len(x))
        expected = np.empty((len(chosen), len(self._columns)))
        for expert in np.unique(chosen):
            mine = chosen == expert
            expected[mine] = x[tokens[mine]] @ self._decode(weights, int(expert)).T
        return expected


def _copy(a: mx.array) -> mx.array:
    copy = oracle.to_mlx(oracle.to_numpy(a))
    mx.eval(copy)
    return copy
