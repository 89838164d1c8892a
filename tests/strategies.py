"""Hypothesis strategies and builders: shapes with remainders, packed weights of any bit pattern,
memory layouts, exactly representable problems.

Shapes and choices are drawn by hypothesis, so they shrink; the numbers inside an array come from a
drawn seed, so that a large array costs one draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np
import oracle
from hypothesis import strategies as st
from oracle import Weight

QQ_MODES = ("mxfp8", "nvfp4")  # the modes that quantize activations
LAYOUTS = ("contiguous", "transposed", "sliced_rows", "sliced_columns", "offset", "reversed")

# --- shapes ---------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)
few_rows = st.integers(1, 8)
many_rows = st.one_of(st.integers(9, 40), st.sampled_from([1, 2, 63, 64, 65, 96, 127, 128, 130]))
columns = st.one_of(st.integers(1, 40), st.integers(41, 140), st.sampled_from([191, 255, 256, 257]))


def depths(group_size: int) -> st.SearchStrategy[int]:
    """K: a whole number of groups, nothing else; one group often, about 2200 rarely."""
    return st.one_of(
        st.integers(1, 5),
        st.integers(1, max(1, 640 // group_size)),
        st.integers(1, 2200 // group_size),
    ).map(lambda groups: groups * group_size)


# --- arrays ---------------------------------------------------------------------------------


def lay_out(a: np.ndarray, layout: str) -> mx.array:
    """An MLX array equal to `a` with the strides that `layout` names (last two dimensions)."""
    if layout == "contiguous" or a.ndim < 2:
        return oracle.to_mlx(a)
    if layout == "transposed":
        return oracle.to_mlx(np.swapaxes(a, -1, -2)).swapaxes(-1, -2)
    filler = np.full((1,), np.nan, a.dtype) if a.dtype.kind not in "iu" else np.ones((1,), a.dtype)
    if layout == "sliced_rows":  # rows of a matrix that has other rows between them
        wide = np.repeat(a, 2, -2)
        wide[..., 1::2, :] = filler
        return oracle.to_mlx(wide)[..., ::2, :]
    if layout == "sliced_columns":  # last stride 2
        wide = np.repeat(a, 2, -1)
        wide[..., 1::2] = filler
        return oracle.to_mlx(wide)[..., ::2]
    if layout == "offset":  # a block inside a larger matrix: first element and row pitch are odd
        wide = np.full((*a.shape[:-2], a.shape[-2] + 2, a.shape[-1] + 3), filler[0], a.dtype)
        wide[..., 1:-1, 1:-2] = a
        return oracle.to_mlx(wide)[..., 1:-1, 1:-2]
    if layout == "reversed":
        return oracle.to_mlx(a[..., ::-1, :])[..., ::-1, :]
    raise ValueError(layout)


def activations(rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype) -> np.ndarray:
    """N(0, 1) in `dtype`, at times with a few large entries or with zeros."""
    x = rng.standard_normal(shape)
    kind = rng.integers(4)
    if kind == 0:
        x = x * np.where(rng.random(shape) < 0.03, 20.0, 1.0)
    elif kind == 1:
        x = x * (rng.random(shape) < 0.6)
    return x.astype(np.float32).astype(oracle.NUMPY_DTYPE[dtype])


def random_codes(rng: np.random.Generator, fmt: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Any code of the format, equally likely, except the two NaN codes of e4m3."""
    codes = rng.integers(0, 2**fmt.bits, shape, dtype=np.uint8)
    values = None if fmt.mode == "affine" else oracle.element_values(fmt)
    return (
        codes if values is None else np.where(np.isnan(values[codes]), 0x7E, codes).astype(np.uint8)
    )


def random_weight(
    rng: np.random.Generator, fmt: Any, N: int, K: int, dtype: mx.Dtype, batch: tuple[int, ...] = ()
) -> Weight:
    """Random words, not only what quantize() makes; scales of either sign, some of them zero.

    Weights have about unit size, so that float16 products stay finite.
    """
    groups = (*batch, N, K // fmt.group_size)
    words = oracle.pack(random_codes(rng, fmt, (*batch, N, K)), fmt.bits)
    if fmt.mode == "affine":
        steps = 2**fmt.bits - 1
        scales = np.exp2(rng.uniform(-4, 1, groups)) / steps * rng.choice([-1, 1], groups)
        scales = np.where(rng.random(groups) < 0.02, 0, scales)
        biases = -scales * steps * rng.uniform(0.2, 0.8, groups) + 0.1 * rng.standard_normal(groups)
        storage = oracle.NUMPY_DTYPE[dtype]
        return Weight(words, scales.astype(storage), biases.astype(storage))
    if fmt.mode == "nvfp4":
        octets = rng.integers(0x08, 0x40, groups)  # 2^-6 .. 2
        octets = np.where(rng.random(groups) < 0.05, rng.integers(0, 8, groups), octets)
        octets = octets | np.where(rng.random(groups) < 0.05, 0x80, 0)
    else:
        octets = 127 + rng.integers(-6, 1, groups) - (8 if fmt.bits == 8 else 1)
    return Weight(words, octets.astype(np.uint8))


@dataclass
class Problem:
    """One product: numpy operands, and the MLX arrays made of them in drawn layouts."""

    fmt: Any
    dtype: mx.Dtype
    M: int
    N: int
    K: int
    seed: int
    x_layout: str = "contiguous"
    w_layout: str = "contiguous"
    with_bias: bool = False
    global_scale: float | None = None
    x: np.ndarray = field(init=False, repr=False)
    w: Weight = field(init=False, repr=False)
    bias: np.ndarray | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.x = activations(rng, (self.M, self.K), self.dtype)
        self.w = random_weight(rng, self.fmt, self.N, self.K, self.dtype)
        if self.with_bias:
            self.bias = activations(rng, (self.N,), self.dtype) * 3

    def keywords(self) -> dict[str, Any]:
        """Format keywords, bias and global_scale as `mlx_lowbit.ops` takes them."""
        return dict(
            **format_keywords(self.fmt), **optional(bias=self.bias, global_scale=self.global_scale)
        )

    def arrays(self) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """x, words, scales, biases as MLX arrays in the drawn layouts."""
        return lay_out(self.x, self.x_layout), *weight_arrays(self.w, self.w_layout)

    def product(self) -> oracle.Product:
        """The float64 reference."""
        return oracle.quantized_matmul(
            self.fmt, self.x, self.w, bias=self.bias, global_scale=self.global_scale
        )


def format_keywords(fmt: Any) -> dict[str, Any]:
    """mode, bits, group_size."""
    return dict(mode=fmt.mode, bits=fmt.bits, group_size=fmt.group_size)


def optional(**values: Any) -> dict[str, Any]:
    """The given values that are not None, as MLX arrays; floats become float32 scalars."""
    made = {k: v for k, v in values.items() if v is not None}
    return {
        k: mx.array(v, mx.float32) if np.ndim(v) == 0 else oracle.to_mlx(v) for k, v in made.items()
    }


def weight_arrays(
    w: Weight, layout: str = "contiguous"
) -> tuple[mx.array, mx.array, mx.array | None]:
    """words, scales and biases (or None) as MLX arrays in one layout."""
    return (
        lay_out(w.words, layout),
        lay_out(w.scales, layout),
        None if w.biases is None else lay_out(w.biases, layout),
    )


@st.composite
def problems(
    draw: st.DrawFn, fmt: Any, dtype: mx.Dtype, rows: st.SearchStrategy[int] = few_rows
) -> Problem:
    """A product of `fmt` and `dtype` with M from `rows`."""
    return Problem(
        fmt,
        dtype,
        draw(rows),
        draw(columns),
        draw(depths(fmt.group_size)),
        draw(seeds),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.booleans()),
        draw(st.one_of(st.none(), st.floats(0.5, 5000, width=32))) if fmt.mode == "nvfp4" else None,
    )


# --- exactly representable problems ---------------------------------------------------------


def exact_weight(
    rng: np.random.Generator, fmt: Any, N: int, K: int, dtype: mx.Dtype, batch: tuple[int, ...] = ()
) -> Weight:
    """A weight whose values have at most 8 significant bits, all multiples of 2^-6 below 2^9.

    Products with integers up to 4 in magnitude, and sums of up to 1024 of them, are then exact in
    float32 in any order, also when a kernel first rounds the weights to bfloat16.
    """
    shape, groups = (*batch, N, K), (*batch, N, K // fmt.group_size)
    if fmt.mode == "affine":
        codes = rng.integers(0, 2**fmt.bits, shape, dtype=np.uint8)
        scales = np.exp2(rng.integers(-2, 1, groups)) * rng.choice([-1, 1], groups)
        biases = -scales * rng.integers(0, 2**fmt.bits, groups)
        storage = oracle.NUMPY_DTYPE[dtype]
        return Weight(oracle.pack(codes, fmt.bits), scales.astype(storage), biases.astype(storage))
    values = oracle.element_values(fmt)
    usable = np.flatnonzero((np.abs(values) <= 15) & (np.mod(values, 0.25) == 0)).astype(np.uint8)
    words = oracle.pack(rng.choice(usable, shape), fmt.bits)
    if fmt.mode == "nvfp4":  # 1/4 .. 2, with three bits of mantissa and either sign
        octets = rng.integers(0x28, 0x41, groups) | rng.choice([0, 0x80], groups)
    else:
        octets = 127 + rng.integers(-3, 2, groups)
    return Weight(words, octets.astype(np.uint8))


def exact_activations(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: mx.Dtype
) -> np.ndarray:
    """Integers from -4 to 4."""
    return rng.integers(-4, 5, shape).astype(np.float32).astype(oracle.NUMPY_DTYPE[dtype])
