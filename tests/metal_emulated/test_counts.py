"""What the emulator counts: floating-point operations, and bytes of our kernels against MLX's."""

from __future__ import annotations

import sys
from pathlib import Path

import arithmetic
import emulator
import host
import numpy as np
import pytest

SOURCE = """
#include <metal_stdlib>
using namespace metal;
[[kernel]] void work(device float* x [[buffer(0)]], uint i [[thread_position_in_grid]]) {
  float a = x[i];
  for (int k = 0; k < 10; k++) a = fma(a, x[i + 32], 1.0f);
  if (i < 8) a = a / x[i + 32] - 2.0f;
  x[i] = a;
}
"""


def test_operations_are_counted():
    library = emulator.compile(SOURCE, "count")
    x = np.ones(64, np.float32)
    report = library.launch("work", {0: x}, threadgroups=(1, 1, 1), threads=(32, 1, 1))
    assert report.arithmetic == 32 * 10 * 2 + 8 * 2
    again = library.launch("work", {0: x}, threadgroups=(1, 1, 1), threads=(8, 1, 1))
    assert again.arithmetic == 8 * 10 * 2 + 8 * 2
    plain = emulator.compile(SOURCE, "run")
    assert plain.launch("work", {0: x}, threadgroups=(1, 1, 1), threads=(8, 1, 1)).arithmetic == 0


@pytest.mark.parametrize(
    "line, count",
    [
        ("  %3 = fadd contract float %1, %2", 1),
        ("  %3 = fmul <4 x float> %1, %2", 4),
        ("  %9 = tail call contract float @llvm.fmuladd.f32(float %1, float %2, float %3)", 2),
        ("  %9 = call <2 x float> @llvm.fma.v2f32(<2 x float> %1, <2 x float> %2, <2 x float> %3)", 4),
        ("  %3 = fpext half %1 to float", 0),
        ("  %3 = add i64 %1, %2", 0),
    ],
)  # fmt: skip
def test_what_counts(line, count):
    assert arithmetic.operations(line) == count


def test_activations_in_prefill_read_weights_twenty_times_less_than_mlx_s(monkeypatch):
    try:
        host.wheel()
    except host.Unavailable as error:
        pytest.skip(str(error))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    from benchmarks import metal_counts

    monkeypatch.setattr(metal_counts, "OPS", {"qqmm": (512,)})
    ours, mlx = metal_counts.measure(((128, 512),), ("mxfp8",))
    assert (ours.whose, mlx.whose) == ("ours", "MLX")
    assert mlx.weights_read >= 20 * ours.weights_read
    # A multiply-add for each element, and what decoding and sums add.
    products = 2 * 512 * 128 * 512
    assert products <= ours.operations < 1.2 * products and mlx.operations >= products
    assert "benchmarks.metal_counts" in sys.modules
