"""Each barrier dropped, each threadgroup array shortened: the tests' launches must notice."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import formats

import kernels

BARRIER = re.compile(r"^ *threadgroup_barrier\(.*\);\n", re.M)
ARRAY = re.compile(r"^( *threadgroup \w+ \w+\[)(.*)(\];)$", re.M)


FORMAT = formats.get(bits=4, group_size=64)
FAMILIES = ("matmul", "group")


def mutants(family):
    """(what, text) of each mutant of a library's text."""
    text = kernels.source(family, FORMAT)
    for i, found in enumerate(BARRIER.finditer(text)):
        yield f"{family} without barrier {i}", text[: found.start()] + text[found.end() :]
    for found in ARRAY.finditer(text):
        short = f"{found[1]}({found[2]}) * 3 / 4{found[3]}"
        yield (
            f"{found[1].split()[-1]}] shortened",
            text[: found.start()] + short + text[found.end() :],
        )


ALL = [(family, *m) for family in FAMILIES for m in mutants(family)]


def wrong_product(seed):
    """Whether a checked launch of two tiles of K shows a problem or wrong numbers."""
    rng = np.random.default_rng(seed)
    fmt = FORMAT
    x = strategies.activations(rng, (17, 320), mx.float16)
    w = strategies.random_weight(rng, fmt, 70, 320, mx.float16)
    y, report = kernels.product("matmul", fmt, x, w, 16, kind="check", seed=seed)
    want = oracle.quantized_matmul(fmt, x, w).value
    off = np.linalg.norm(y.astype(np.float64) - want) / np.linalg.norm(want)
    return report.problems > 0 or not off <= 2.0**-11


def wrong_order(seed):
    """The same of sorting 100 pairs by 1023 matrices."""
    rhs = np.random.default_rng(seed).integers(0, 1023, 100)
    try:
        got = kernels.group(rhs, 1, 1023, "check", seed)
    except AssertionError:
        return True
    return not np.array_equal(got[:100], np.argsort(rhs, kind="stable"))


def noticed(family):
    """In a process of its own: a mutant that reads anywhere may end it, which counts."""

    def launches():
        faulthandler.disable()
        wrong = wrong_product if family == "matmul" else wrong_order
        os._exit(any(wrong(seed) for seed in range(3)))

    process = multiprocessing.get_context("fork").Process(target=launches)
    process.start()
    process.join(120)
    return process.exitcode != 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_as_it_is_passes(family):
    assert not noticed(family)


@pytest.mark.parametrize("family", ["matvec", "vecmat", "quantize"])
def test_the_others_have_nothing_to_drop(family):
    assert not list(mutants(family))


def test_there_are_mutants():
    assert len(ALL) >= 7


@pytest.mark.parametrize("family, what, text", ALL, ids=[what for _, what, _ in ALL])
def test_mutants_are_noticed(family, what, text, monkeypatch):
    monkeypatch.setattr(kernels, "source", lambda *_: text)
    kernels.library.cache_clear()
    try:
        assert noticed(family), what
    finally:
        kernels.library.cache_clear()
