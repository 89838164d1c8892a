"""The bit stream: where code i of a row lies, and that nothing moves on the way there and back."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import oracle
import strategies
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit import ops


def values_of(fmt: Any, codes: np.ndarray) -> np.ndarray:
    """What `codes` mean with a scale of one (and no bias), through `dequantize`."""
    groups = (*codes.shape[:-1], codes.shape[-1] // fmt.group_size)
    words = oracle.to_mlx(oracle.pack(codes, fmt.bits))
    if fmt.has_biases:
        y = ops.dequantize(
            words, mx.ones(groups), mx.zeros(groups), **strategies.format_keywords(fmt)
        )
    else:
        one = int(np.flatnonzero(oracle.scale_values(fmt) == 1)[0])
        y = ops.dequantize(
            words,
            mx.full(groups, one, mx.uint8),
            dtype=mx.float32,
            **strategies.format_keywords(fmt),
        )
    return np.array(y)


def test_golden_words():
    """Codes 7 6 5 4 3 2 1 0, repeated: the words that MLX makes of them at 3 and 4 bits."""
    codes = np.resize(np.arange(7, -1, -1, dtype=np.uint8), 32)
    assert [hex(w) for w in oracle.pack(codes, 3)] == ["0x77053977", "0x39770539", "0x5397705"]
    assert [hex(w) for w in oracle.pack(codes, 4)] == ["0x1234567"] * 4


@given(data=st.data())
def test_oracle_pack_is_a_bijection(fmt, data):
    rng = np.random.default_rng(data.draw(strategies.seeds))
    K = data.draw(strategies.depths(fmt.group_size))
    codes = rng.integers(0, 2**fmt.bits, (3, K), dtype=np.uint8)
    words = oracle.pack(codes, fmt.bits)
    assert words.shape == (3, K * fmt.bits // 32)
    np.testing.assert_array_equal(oracle.unpack(words, fmt.bits), codes)


def test_each_position_of_a_row(fmt):
    """One row a position: only that code is not zero, so a shifted or lost bit shows."""
    K = 2 * fmt.group_size
    for code in {1, 2 ** (fmt.bits - 1) + 1, 2 ** (fmt.bits - 1) - 2}:
        codes = np.zeros((K, K), np.uint8)
        np.fill_diagonal(codes, code)
        got = values_of(fmt, codes)
        want = float(code) if fmt.has_biases else oracle.element_values(fmt)[code]
        np.testing.assert_array_equal(got, np.eye(K) * want)


@given(data=st.data())
def test_values_keep_their_words(fmt, data):
    """quantize(dequantize(words)) has the same values where groups use their whole range."""
    rng = np.random.default_rng(data.draw(strategies.seeds))
    N, K = data.draw(strategies.columns), data.draw(strategies.depths(fmt.group_size))
    codes = strategies.random_codes(rng, fmt, (N, K))
    largest = 2**fmt.bits - 1 if fmt.has_biases else {4: 7, 8: 0x7E}[fmt.bits]
    codes[:, :: fmt.group_size] = largest
    codes[:, 1 :: fmt.group_size] = 0
    values = values_of(fmt, codes)
    words, scales, biases = ops.quantize(mx.array(values), **strategies.format_keywords(fmt))
    again = ops.dequantize(
        words, scales, biases, dtype=mx.float32, **strategies.format_keywords(fmt)
    )
    np.testing.assert_array_equal(np.array(again), values)
    if not fmt.has_biases:  # affine stores the complement: its scale is negative
        same = oracle.unpack(np.array(words), fmt.bits)
        np.testing.assert_array_equal(
            np.where(values == 0, 0, same), np.where(values == 0, 0, codes)
        )
