"""Each barrier dropped, each threadgroup array shortened: the tests' launches must notice.

A mutant that no launch can notice is in JUSTIFIED, with its reason.
"""

from __future__ import annotations

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
# Elements at the end of an array that nothing reads or writes: the padding of its last row.
SPARE = {"staged": "kPad"}
# Mutants that nothing can notice, and why.
JUSTIFIED: dict[str, str] = {}


def mutants(family):
    """(what, text) of each mutant of a library's text."""
    text = kernels.source(family, FORMAT)
    for i, found in enumerate(BARRIER.finditer(text)):
        yield f"{family} without barrier {i}", text[: found.start()] + text[found.end() :]
    for found in ARRAY.finditer(text):
        name = found[1].split()[-1].removesuffix("[")
        for what, size in (("a quarter", "* 3 / 4"), ("one", f"- 1 - {SPARE.get(name, 0)}")):
            short = f"{found[1]}({found[2]}) {size}{found[3]}"
            mutant = text[: found.start()] + short + text[found.end() :]
            yield f"{family} with {name} shorter by {what}", mutant


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
    """A mutant that reads anywhere may end its process, which counts."""
    wrong = wrong_product if family == "matmul" else wrong_order

    def launches():
        assert not any(wrong(seed) for seed in range(3))

    return kernels.fails(launches)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_as_it_is_passes(family):
    assert not noticed(family)


@pytest.mark.parametrize("family", ["matvec", "matmul", "vecmat", "quantize", "group"])
def test_every_barrier_and_array_has_its_mutants(family):
    """However they are written; matvec, vecmat and what goes over elements have none."""
    text = re.sub(r"//.*", "", kernels.source(family, FORMAT))
    barriers = len(re.findall(r"_barrier\s*\(", text))
    arrays = len(re.findall(r"\bthreadgroup\b[^*&;()]*\[", text))
    assert len(list(mutants(family))) == barriers + 2 * arrays
    assert (barriers + arrays > 0) == (family in FAMILIES)


def test_at_least_19_of_20_are_to_be_noticed():
    names = [what for _, what, _ in ALL]
    assert len(set(names)) == len(names) and set(JUSTIFIED) <= set(names)
    assert len(JUSTIFIED) <= len(ALL) / 20


@pytest.mark.parametrize("family, what, text", ALL, ids=[what for _, what, _ in ALL])
def test_mutants_are_noticed(family, what, text, monkeypatch):
    monkeypatch.setattr(kernels, "source", lambda *_: text)
    kernels.library.cache_clear()
    try:
        assert noticed(family) != (what in JUSTIFIED), what
    finally:
        kernels.library.cache_clear()
