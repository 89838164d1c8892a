"""The emulator itself: right kernels run, and each kind of mistake is reported."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from preprocess import MetalError

HEADER = "#include <metal_stdlib>\nusing namespace metal;\n"
SUM = """
[[kernel]] void sums(const device float* x [[buffer(0)]], device float* y [[buffer(1)]],
                     const constant int& n [[buffer(2)]],
                     uint group [[threadgroup_position_in_grid]],
                     uint i [[thread_position_in_grid]],
                     uint thread_index [[thread_index_in_threadgroup]],
                     uint simdgroup [[simdgroup_index_in_threadgroup]],
                     uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float parts[4];
  const float mine = int(i) < n ? x[i] : 0.0f;
  const float sum = simd_sum(mine);
  if (lane == 0) parts[simdgroup] = sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index == 0) y[group] = parts[0] + parts[1] + parts[2] + parts[3];
}
"""


def launch(source, kind="check", groups=3, n=300, kernel="sums", seed=1, **constants):
    x = np.arange(n, dtype=np.float32)
    y = np.full(groups, np.nan, np.float32)
    library = emulator.compile(HEADER + source, kind)
    report = library.launch(
        kernel,
        {0: x, 1: y, 2: np.int32(n).tobytes()},
        threadgroups=(groups, 1, 1),
        threads=(128, 1, 1),
        constants=constants.get("constants"),
        seed=seed,
        order=constants.get("order", "greedy"),
    )
    return y, report


@pytest.mark.parametrize("order", emulator.ORDERS)
@pytest.mark.parametrize("kind", ["run", "check"])
def test_a_right_kernel_runs(kind, order):
    y, report = launch(SUM, kind, order=order)
    assert report.problems == 0 and report.barriers == 3 and report.threadgroup_bytes == 16
    x = np.concatenate([np.arange(300.0), np.zeros(84)])
    np.testing.assert_array_equal(y, x.reshape(3, 128).sum(1))
    if kind == "check":
        assert (report.read[0], report.written[0]) == (1200, 0)
        assert (report.read[1], report.written[1]) == (0, 12)


WRONG = {
    "a missing barrier": (
        SUM.replace("  threadgroup_barrier(mem_flags::mem_threadgroup);\n", ""),
        "RACE",
    ),
    "an operation under divergence": (
        SUM.replace("= simd_sum(mine)", "= lane < 16 ? simd_sum(mine) : mine"),
        "DIVERGENT",
    ),
    "a barrier that some threads skip": (
        SUM.replace("const float sum", "if (thread_index >= 64) return;\n  const float sum"),
        "BARRIER",
    ),
    "a read beyond a buffer": (SUM.replace("int(i) < n ?", "int(i) <= n ?"), "OUT OF BOUNDS device read"),
    "a write beyond a buffer": (SUM.replace("y[group] =", "y[group + 1] ="), "OUT OF BOUNDS device write"),
    "a short threadgroup array": (SUM.replace("parts[4]", "parts[3]"), "OUT OF BOUNDS threadgroup"),
    "two writers": (SUM.replace("y[group] =", "y[0] ="), "RACE"),
    "too much threadgroup memory": (SUM.replace("parts[4]", "parts[16384]"), "32 KiB"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_reported(name):
    source, message = WRONG[name]
    assert source != SUM
    _, report = launch(source)
    assert report.problems > 0 and message in report.messages, report.messages


def test_unwritten_threadgroup_memory_is_nan():
    source = SUM.replace("if (lane == 0) parts[simdgroup] = sum;", "")
    y, _ = launch(source, "run")
    assert np.isnan(y).all()


def test_function_constants():
    source = "constant bool twice [[function_constant(7)]];\n" + SUM.replace(
        "= parts[0]", "= (twice ? 2.0f : 1.0f) * parts[0]"
    )
    y = [launch(source, "run", constants={7: value})[0] for value in (False, True)]
    assert y[1][0] > y[0][0]
    with pytest.raises(KeyError, match="constant 8"):
        launch(source, "run", constants={8: 1})
    with pytest.raises(KeyError, match="no kernel products"):
        launch(source, "run", kernel="products")


REFUSED = {
    "device to thread": "void f(device float* x) { thread float* y = x; }",
    "threadgroup to device": "void f(threadgroup float* x) { device float* y = x; }",
    "write to const": "void f(const device float* x) { x[0] = 1; }",
    "write to constant": "void f(constant float* x) { x[0] = 1; }",
    "unknown function": "float f(float x) { return sinus(x); }",
    "float to bfloat": "bfloat f(float x) { bfloat y = x; return y; }",
    "half to bfloat": "bfloat f(half x) { bfloat y = x; return y; }",
    "double": "float f(float x) { double y = x; return float(y); }",
    "no address space": "[[kernel]] void f(float* x [[buffer(0)]]) {}",
    "unknown attribute": "[[kernel]] void f(uint i [[thread_position_in_moon]]) {}",
    "a host's header": "#include <vector>\n",
    "throw": "void f() { throw 1; }",
}


@pytest.mark.parametrize("name", REFUSED)
def test_the_type_check_refuses(name):
    with pytest.raises(MetalError):
        emulator.typecheck(HEADER + REFUSED[name])


def test_the_type_check_accepts():
    emulator.typecheck(HEADER + SUM)
