"""quantize of NaN and infinity: refused with the first index, or kept inside its group."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import ops

BAD = [np.nan, np.inf, -np.inf]


def with_bad(
    fmt, dtype, *places: tuple[int, ...], value: float, shape: tuple[int, ...]
) -> mx.array:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    for place in places:
        w[place] = value
    return oracle.to_mlx(w.astype(oracle.NUMPY_DTYPE[dtype]))


@pytest.mark.parametrize("value", BAD)
def test_raise_names_the_first_index(fmt, dtype, value):
    K = 3 * fmt.group_size
    w = with_bad(fmt, dtype, (5, 2), (3, K - 1), (4, 0), value=value, shape=(7, K))
    with pytest.raises(ValueError, match=rf"\bw\b.*\b3, {K - 1}\b") as error:
        ops.quantize(w, **strategies.format_keywords(fmt))
    assert ("nan" if np.isnan(value) else "inf") in str(error.value).lower()


def test_index_has_the_rank_of_w(fmt):
    w = with_bad(fmt, mx.float32, (1, 0, 3), value=np.nan, shape=(2, 4, fmt.group_size))
    with pytest.raises(ValueError, match=r"\b1, 0, 3\b"):
        ops.quantize(w, **strategies.format_keywords(fmt))


def test_index_of_a_view(fmt):
    """The index is that of the argument, not of the buffer behind a transposed view."""
    w = with_bad(fmt, mx.float32, (9, 1), value=np.inf, shape=(fmt.group_size, 4)).T
    with pytest.raises(ValueError, match=r"\b1, 9\b"):
        ops.quantize(w, **strategies.format_keywords(fmt))


@pytest.mark.parametrize("value", BAD)
def test_propagate_makes_its_group_nan(fmt, dtype, value):
    """The group of the bad value decodes to NaN; every other group is what it is without it."""
    g = fmt.group_size
    clean = with_bad(fmt, dtype, value=0, shape=(5, 4 * g))
    dirty = with_bad(fmt, dtype, (0, 0), (2, 2 * g - 1), (4, 3 * g), value=value, shape=(5, 4 * g))
    keywords = strategies.format_keywords(fmt)
    q = ops.quantize(dirty, nan_policy="propagate", **keywords)
    y = oracle.f64(ops.dequantize(*q, dtype=mx.float32, **keywords))
    want = oracle.f64(
        ops.dequantize(*ops.quantize(clean, **keywords), dtype=mx.float32, **keywords)
    )
    hit = np.zeros((5, 4), bool)
    hit[0, 0] = hit[2, 1] = hit[4, 3] = True
    hit = np.repeat(hit, g, 1)
    assert np.isnan(y[hit]).all()
    np.testing.assert_array_equal(y[~hit], want[~hit])
    decoded = oracle.decode(
        fmt, oracle.Weight(*(None if a is None else oracle.to_numpy(a) for a in q))
    )
    assert np.isnan(decoded[hit]).all(), "NaN only by our decode"


def test_propagate_agrees_on_finite_input(fmt, dtype):
    w = with_bad(fmt, dtype, value=0, shape=(3, 2 * fmt.group_size))
    keywords = strategies.format_keywords(fmt)
    for a, b in zip(
        ops.quantize(w, **keywords),
        ops.quantize(w, nan_policy="propagate", **keywords),
        strict=True,
    ):
        assert (a is None and b is None) or mx.array_equal(a, b).item()


def test_propagate_is_lazy(fmt):
    """No value is needed to build the graph: it can be compiled, where values do not exist yet."""
    keywords = dict(nan_policy="propagate", **strategies.format_keywords(fmt))

    def words(w: mx.array) -> mx.array:
        return ops.quantize(w, **keywords)[0]

    w = mx.random.normal((3, 2 * fmt.group_size))
    assert mx.array_equal(mx.compile(words)(w), words(w)).item()


def test_unknown_policy_is_refused():
    with pytest.raises(ValueError, match=r"nan_policy.*raise.*propagate.*'ignore'"):
        ops.quantize(mx.ones((2, 64)), nan_policy="ignore")


def test_largest_finite_values_are_not_refused(fmt, dtype):
    """The check is for NaN and infinity, not for a sum or product that overflows on the way."""
    largest = float(np.finfo(np.float16).max) if dtype == mx.float16 else 3e38
    w = np.full((2, fmt.group_size), largest, np.float32).astype(oracle.NUMPY_DTYPE[dtype])
    mx.eval(ops.quantize(oracle.to_mlx(w), **strategies.format_keywords(fmt))[:2])
