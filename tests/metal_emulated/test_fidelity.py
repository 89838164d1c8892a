"""The emulator against MLX's own kernels: their source agrees to the bit with what Apple compiled."""

from __future__ import annotations

import air
import host
import mlx.core as mx
import mlx_kernels
import numpy as np
import oracle
import pytest
from mlx_kernels import Case

AFFINE, MXFP8, NVFP4 = ("affine", 4, 64), ("mxfp8", 8, 32), ("nvfp4", 4, 16)
# In float32 Apple's form runs as well.
BOTH = [
    Case(*AFFINE, "qmv_fast", mx.float32, 1, 512, 512),
    Case(*AFFINE, "qmm_t", mx.float32, 32, 64, 256),
    Case(*MXFP8, "qmv_fast", mx.float32, 1, 512, 512),
    Case(*NVFP4, "qmm_t", mx.float32, 32, 64, 256),
]
SOURCES = [
    Case(*AFFINE, "qmv", mx.float32, 2, 500, 448),
    Case(*AFFINE, "qmv_wide", mx.float32, 7, 65, 256),
    Case(*AFFINE, "qmv_fast", mx.float16, 1, 64, 512),
    Case(*AFFINE, "qmm_t", mx.float32, 17, 64, 256),
    Case(*AFFINE, "qmm_t_unaligned", mx.float32, 17, 200, 256),
    Case(*AFFINE, "qmm_t", mx.float16, 32, 64, 256),
    Case(*MXFP8, "qmv", mx.float32, 1, 100, 416),
    Case(*MXFP8, "qmv_wide", mx.bfloat16, 5, 60, 512),
    Case(*NVFP4, "qmv_fast", mx.bfloat16, 1, 64, 512),
]
TOLERANCE = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 1.6e-2}  # of the largest result


@pytest.fixture(scope="module", autouse=True)
def _wheel():
    try:
        host.wheel()
    except host.Unavailable as error:
        pytest.skip(str(error))


def library(case, kind):
    """That of all cases of its header."""
    affine = case.mode == "affine"
    group = tuple(c for c in BOTH + SOURCES if (c.mode == "affine") == affine)
    return mlx_kernels.library(group, kind)


@pytest.mark.parametrize("kind", ["run", "check"])
@pytest.mark.parametrize("case", BOTH + SOURCES, ids=lambda case: f"{case.name}-{case.M}")
def test_mlx_s_kernels_are_right(case, kind):
    x, parts, exact = mlx_kernels.operands(case)
    y, report = mlx_kernels.launch(case, library(case, kind), case.name, x, parts)
    assert report.problems == 0, report.messages
    off = np.abs(oracle.f64(y) - exact).max() / np.abs(exact).max()
    assert off <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", BOTH, ids=lambda case: case.name)
def test_source_and_apple_s_code_agree_to_the_bit(case):
    if reason := air.missing():
        pytest.skip(reason)
    apple = air.load(host.wheel() / "lib" / "mlx.metallib", [case.apple_name()])
    x, parts, _ = mlx_kernels.operands(case)
    ours, _ = mlx_kernels.launch(case, library(case, "run"), case.name, x, parts)
    theirs, _ = mlx_kernels.launch(case, apple, case.apple_name(), x, parts)
    np.testing.assert_array_equal(oracle.bits_of(ours), oracle.bits_of(theirs))
    assert np.isfinite(theirs).all()
