"""Each barrier dropped, each threadgroup array shortened: the tests' launches must notice."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import re
import shutil

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import formats

import kernels

BARRIER = re.compile(r"^ *threadgroup_barrier\(.*\);\n", re.M)
ARRAY = re.compile(r"^( *threadgroup \w+ \w+\[)(.*)(\];)$", re.M)


def mutants(file):
    """(what, text) of each mutant of a header."""
    text = (kernels.SOURCES / file).read_text()
    for found in BARRIER.finditer(text):
        line = text.count("\n", 0, found.start()) + 1
        yield f"{file}:{line} without its barrier", text[: found.start()] + text[found.end() :]
    for found in ARRAY.finditer(text):
        short = f"{found[1]}({found[2]}) * 3 / 4{found[3]}"
        line = text.count("\n", 0, found.start()) + 1
        yield f"{file}:{line} shortened", text[: found.start()] + short + text[found.end() :]


ALL = [(file, *m) for file in ("matmul.h", "group.h") for m in mutants(file)]


def wrong_product(seed):
    """Whether a checked launch of two tiles of K shows a problem or wrong numbers."""
    rng = np.random.default_rng(seed)
    fmt = formats.get(bits=4, group_size=64)
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


def noticed(file):
    """In a process of its own: a mutant that reads anywhere may end it, which counts."""

    def launches():
        faulthandler.disable()
        wrong = wrong_product if file == "matmul.h" else wrong_order
        os._exit(any(wrong(seed) for seed in range(3)))

    process = multiprocessing.get_context("fork").Process(target=launches)
    process.start()
    process.join(120)
    return process.exitcode != 0


@pytest.mark.parametrize("file", ["matmul.h", "group.h"])
def test_the_text_as_it_is_passes(file):
    assert not noticed(file)


def test_there_are_mutants():
    assert len(ALL) >= 7


@pytest.mark.parametrize("file, what, text", ALL, ids=[what for _, what, _ in ALL])
def test_mutants_are_noticed(file, what, text, tmp_path, monkeypatch):
    for folder in ("metal", "formats"):
        shutil.copytree(kernels.SOURCES.parent / folder, tmp_path / "kernels" / folder)
    (tmp_path / "kernels" / "metal" / file).write_text(text)
    monkeypatch.setattr(kernels, "SOURCES", tmp_path / "kernels" / "metal")
    kernels.library.cache_clear()
    try:
        assert noticed(file), what
    finally:
        kernels.library.cache_clear()
