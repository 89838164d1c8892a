"""Adversarial inputs of a quantizer: named matrices in which every row is a few hostile groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import oracle

ROWS = 48

# Smallest and largest binary exponent that a dtype's entries are drawn around.
EXPONENTS = {mx.float32: (-149, 100), mx.float16: (-24, 14), mx.bfloat16: (-133, 100)}


def raw(rng: np.random.Generator, K: int, dtype: mx.Dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Name and float64 values [rows, K]; see `corpora` for what is done with them."""
    low, high = EXPONENTS[dtype]
    shape, each_row = (ROWS, K), (ROWS, 1)
    normal = rng.standard_normal(shape)
    yield "normal", normal
    yield "row_sizes", normal * np.exp2(rng.integers(max(low, -30), 10, each_row))
    yield "shifted", normal + 5
    yield "positive", np.abs(normal)
    yield "negative", -np.abs(normal)
    yield "heavy_tail", rng.standard_t(2, shape)
    yield "wide", rng.choice([-1, 1], shape) * np.exp2(rng.uniform(-20, 4, shape))
    # Multiples of 1/8 and 1/4 of one power of two: halfway cases of every element grid.
    yield "eighths", rng.integers(-48, 49, shape) / 8 * np.exp2(rng.integers(-8, 8, each_row))
    yield "quarters", rng.integers(-24, 25, shape) / 4
    one_hot = np.zeros(shape)
    one_hot[np.arange(ROWS), rng.integers(0, K, ROWS)] = 10 * rng.standard_normal(ROWS)
    yield "one_hot", one_hot
    yield "constant", np.repeat(rng.standard_normal(each_row), K, 1)
    yield "almost_constant", 1 + normal * 1e-7
    yield "tiny_range", normal * 10.0 ** rng.integers(-9, -5, each_row)
    yield "zero", np.zeros((4, K))
    yield "negative_zero", np.where(rng.random(shape) < 0.5, -0.0, normal * 0.01)
    yield "all_negative_zero", np.full((4, K), -0.0)
    yield "subnormal", normal * np.exp2(rng.integers(low, low + 30, each_row))
    yield "huge", normal * np.exp2(rng.integers(5, high, each_row))
    yield (
        "both_edges_equal",
        rng.choice([-1.0, 1.0, 0.25], shape) * np.exp2(rng.integers(-3, 4, each_row)),
    )


def corpora(
    rng: np.random.Generator, fmt: Any, dtype: mx.Dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array [rows, K] in `dtype`, all finite, K two groups (four of nvfp4)."""
    K = max(64, 2 * fmt.group_size)
    storage = oracle.NUMPY_DTYPE[dtype]
    for name, values in raw(rng, K, dtype):
        with np.errstate(over="ignore"):
            a = values.astype(np.float32).astype(storage)
        yield name, np.where(np.isfinite(a.astype(np.float32)), a, np.ones((), storage))
    yield "scale_boundaries", scale_boundaries(rng, fmt, K, storage)
    yield "element_boundaries", element_boundaries(rng, fmt, K, storage)


def neighbours(rng: np.random.Generator, a: np.ndarray, steps: int) -> np.ndarray:
    """`a` moved by up to `steps` representable values; signs and zeros are kept."""
    pattern = oracle.bits_of(a).astype(np.int64)
    moved = np.where(
        (pattern & ~(1 << (8 * a.itemsize - 1))) > steps,
        pattern + rng.integers(-steps, steps + 1, a.shape),
        pattern,
    )
    return moved.astype(oracle.bits_of(a).dtype).view(a.dtype)


def scale_boundaries(rng: np.random.Generator, fmt: Any, K: int, storage: np.dtype) -> np.ndarray:
    """Groups whose largest magnitude is a few units away from where the scale changes."""
    shape = (ROWS, K)
    low = -8 if storage.itemsize == 2 and storage == np.float16 else -60
    if fmt.mode == "affine":
        peak = np.exp2(rng.integers(low, 8, shape[0]))
    elif fmt.mode == "nvfp4":
        values = np.arange(0x01, 0x7E, dtype=np.uint8).view(oracle.E4M3).astype(np.float64)
        peak = 6 * rng.choice((values[1:] + values[:-1]) / 2, shape[0])
    else:
        peak = (448 if fmt.bits == 8 else 6) * np.exp2(rng.integers(low, 5, shape[0]))
    peaks = neighbours(rng, peak.astype(np.float32).astype(storage), 3)
    rest = (rng.uniform(-0.9, 0.9, shape) * peaks[:, None].astype(np.float64)).astype(storage)
    rest[:, :: fmt.group_size] = peaks[:, None] * rng.choice([-1, 1], (ROWS, 1)).astype(storage)
    return rest


def element_boundaries(rng: np.random.Generator, fmt: Any, K: int, storage: np.dtype) -> np.ndarray:
    """Elements a few units of storage away from halfway between two codes of their group."""
    w = scale_boundaries(rng, fmt, K, storage)
    if fmt.mode == "affine":
        return w
    q = oracle.encode(fmt, w)
    scale = np.repeat(oracle.scale_values(fmt)[q.scales], fmt.group_size, -1)
    values = oracle.element_values(fmt)
    values = np.unique(values[np.isfinite(values)])
    middles = rng.choice((values[1:] + values[:-1]) / 2, w.shape) * scale
    moved = neighbours(rng, middles.astype(np.float32).astype(storage), 2)
    peak = np.repeat(np.abs(w[:, :: fmt.group_size]), fmt.group_size, -1)
    keep = (np.abs(moved.astype(np.float64)) <= peak.astype(np.float64)) & (
        np.arange(K) % fmt.group_size != 0
    )
    return np.where(keep, moved, w)
