"""The Metal plan table, which needs no device: every problem gets a kernel that there is."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit import _ext

MATVEC, MATMUL, VECMAT = range(3)
FLOAT32, FLOAT16, BFLOAT16 = range(3)
ROWS = {MATVEC: 4, MATMUL: 32, VECMAT: 1024}  # of w, a simdgroup; 16 beside 128 tokens
SIZES = "pgscd"


def plan(fmt, M, N, K, dtype=BFLOAT16, **options):
    return _ext.metal_plan(fmt.id, dtype, M, N, K, **options)


@pytest.mark.parametrize("M, tokens", [(1, 1), (2, 2), (3, 4), (4, 4)])
def test_few_rows_read_weights_once(fmt, M, tokens):
    words, kernel, got, *_ = plan(fmt, M, 4096, 4096)
    assert (kernel, got) == (MATVEC, tokens), words


def test_float32_keeps_to_matvec(fmt):
    assert plan(fmt, 8, 4096, 4096, FLOAT32)[1:3] == (MATVEC, 8)
    assert plan(fmt, 9, 4096, 4096, FLOAT32)[1:3] == (MATMUL, 16)


@pytest.mark.parametrize(
    "M, tokens",
    [(5, 8), (8, 8), (9, 16), (17, 32), (33, 64), (65, 128), (129, 64), (128, 128), (2048, 128)],
)
def test_tiles_are_as_wide_as_x(fmt, dtype, M, tokens):
    number = [mx.float32, mx.float16, mx.bfloat16].index(dtype)
    words, kernel, got, *_ = plan(fmt, M, 14336, 4096, number)
    assert (kernel, got) == ((MATVEC, 8) if number == 0 and M <= 8 else (MATMUL, tokens)), words


def test_larger_chips_get_smaller_threadgroups(fmt):
    shares = [plan(fmt, 16, 4096, 4096, size=size)[3] for size in SIZES]
    assert shares == sorted(shares, reverse=True) and shares[0] == 16 and shares[-1] < 8


def test_pairs(judged_fmt):
    few = plan(judged_fmt, 1, 1408, 4096, pairs=8, matrices=128)
    many = plan(judged_fmt, 1, 1408, 4096, pairs=4096, matrices=128)
    huge = plan(judged_fmt, 1, 1408, 4096, pairs=4096, matrices=1024)
    assert few[1] == MATVEC and not few[4] and "pair by pair" in few[0]
    assert many[1:3] == (MATMUL, 32) and many[4] and "sorted" in many[0]
    assert huge[1] == MATVEC and not huge[4], "more matrices than can be sorted"


def test_without_transpose(fmt):
    words, kernel, *_ = plan(fmt, 3, 4096, 4096, transpose=False)
    assert kernel == VECMAT and "MLX's matmul" in words
    words, kernel, *_ = plan(fmt, 3, 4096, 4096, transpose=False, pairs=5, matrices=3)
    assert kernel == VECMAT and "vecmat" in words


@given(data=st.data())
def test_every_plan_has_its_kernel(fmt, data):
    M, N = data.draw(st.integers(1, 5000)), data.draw(st.integers(1, 5000))
    K = fmt.group_size * data.draw(st.integers(1, 100))
    dtype = data.draw(st.integers(0, 2))
    options = {"size": data.draw(st.sampled_from(SIZES)), "transpose": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        options |= {
            "pairs": data.draw(st.integers(1, 5000)),
            "matrices": data.draw(st.integers(1, 1200)),
        }
    elif fmt.mode in ("mxfp8", "nvfp4") and options["transpose"]:
        options["quantize_x"] = data.draw(st.booleans())
    words, kernel, tokens, simdgroups, grouped = plan(fmt, M, N, K, dtype, **options)
    of_x = BFLOAT16 if options.get("quantize_x") else dtype
    _, entries = _ext.metal_source([kernel], fmt.id)
    assert (kernel, of_x, tokens) in [entry[1:] for entry in entries], words
    assert 1 <= simdgroups <= 32 and (not grouped or options["matrices"] <= 1023)
    if "threadgroup" in words:
        rows = int(re.search(r"x (\d+) rows of w", words)[1])
        assert rows == simdgroups * (16 if tokens == 128 else ROWS[kernel])


def test_sources_are_whole(fmt):
    """Nothing is included but what belongs to Metal, and every instance is there by its name."""
    for kernel in range(7):
        if kernel == 5 and fmt.has_biases:  # activations are quantized in the block modes alone
            continue
        text, entries = _ext.metal_source([kernel], fmt.id)
        assert not re.search(r'#include "', text) and "#pragma once" not in text
        for name, *_ in entries:
            assert name == "group" or f'host_name("{name}")' in text
