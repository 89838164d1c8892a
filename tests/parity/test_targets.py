"""One instruction set against another: each in a process of its own, on the same operands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from mlx_lowbit import _ext

SCRIPT = """
import os, sys
os.environ["MLX_LOWBIT_POISON"] = "1"
sys.path.insert(0, sys.argv[1])
import mlx.core as mx, numpy as np
mx.set_default_device(mx.cpu)
import checks, oracle, strategies
from mlx_lowbit import _ext, formats, ops
assert _ext.target() == os.environ["MLX_LOWBIT_TARGET"], _ext.target()
found = {}
for fmt in formats.FORMATS:
    keywords = strategies.format_keywords(fmt)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        for M, N, groups in [(1, 37, 5), (4, 70, 3), (7, 33, 4), (19, 65, 3), (70, 19, 2)]:
            K = groups * fmt.group_size
            p = strategies.Problem(fmt, dtype, M, N, K, seed=M, with_bias=True)
            name = f"{fmt.name} {dtype} {M}"
            found[name + " product"] = oracle.f64(checks.run(p))
            if fmt.mode in ("mxfp8", "nvfp4"):
                x, words, scales, _ = p.arrays()
                found[name + " qqmm"] = oracle.f64(ops.qqmm(x, words, scales, **keywords))
        w = strategies.activations(np.random.default_rng(5), (13, 6 * fmt.group_size), dtype)
        q = ops.quantize(oracle.to_mlx(w), **keywords)
        for part, a in zip(("words", "scales", "biases"), q):
            if a is not None:
                found[f"{fmt.name} {dtype} {part}"] = oracle.bits_of(oracle.to_numpy(a))
        values = ops.dequantize(*q, dtype=dtype, **keywords)
        found[f"{fmt.name} {dtype} dequantize"] = oracle.f64(values)
np.savez(sys.argv[2], **found)
"""

TARGETS = _ext.targets()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, dict[str, np.ndarray]]:
    """Target name to everything that the script computed on it."""
    found = {}
    for target in TARGETS:
        path = tmp_path_factory.mktemp("targets") / f"{target}.npz"
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(Path(__file__).parents[1]), str(path)],
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, "MLX_LOWBIT_TARGET": target, "OPENBLAS_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        found[target] = dict(np.load(path))
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_quantized_bits_are_the_same(results, target):
    """Codes, scales and biases do not depend on the instruction set; nor do block values."""
    exact = ("words", "scales", "biases")
    for name, want in results["generic"].items():
        if name.endswith(exact) or ("affine" not in name and name.endswith("dequantize")):
            np.testing.assert_array_equal(results[target][name], want, err_msg=name)


@pytest.mark.parametrize("target", TARGETS)
def test_affine_values_differ_by_roundings_only(results, target):
    """s * q + b with one rounding (fused) or two."""
    for name, want in results["generic"].items():
        if "affine" in name and name.endswith("dequantize"):
            unit = 2.0**-23 if "float32" in name else 2.0**-10 if ".float16" in name else 2.0**-7
            assert np.abs(results[target][name] - want).max() <= 2 * unit * np.abs(want).max(), name


@pytest.mark.parametrize("target", TARGETS)
def test_products_agree(results, target):
    """Two computations within the tolerance of the truth are within twice of it of each other."""
    for name, want in results["generic"].items():
        if name.endswith(("product", "qqmm")):
            bound = 4e-6 if "float32" in name else 2.0**-10 if ".float16" in name else 2.0**-7
            error = np.linalg.norm(results[target][name] - want) / np.linalg.norm(want)
            assert error <= bound, (name, error)


def test_generic_is_always_there():
    assert TARGETS[-1] == "generic" or "generic" in TARGETS
    assert _ext.target() in TARGETS
