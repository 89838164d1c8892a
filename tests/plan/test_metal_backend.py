"""What the package does on a Mac whose compiler or loader disappoints: MLX's own ops run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx_lowbit
import pytest
from mlx_lowbit import _ext, backend, doctor


@pytest.fixture
def calls(monkeypatch):
    """An operation whose kernel is refused: what it ran on, call by call."""
    monkeypatch.setattr(backend, "_noticed", set())
    monkeypatch.setattr(backend, "refusals", {})
    ran = []

    @backend.on_mlx_where_refused
    def product(x, *, fails="matvec_mxfp8: no such type\nline 2"):
        reason = backend.reason_for_mlx("product")
        ran.append("ours" if reason is None else "MLX's")
        if reason is None and fails:
            raise _ext.KernelRefused(fails)
        return x

    product.ran = ran
    return product


def test_a_refused_kernel_is_replaced(calls):
    with pytest.warns(
        UserWarning, match=r"\[product\] uses MLX's own op.*matvec_mxfp8: no such type$"
    ):
        assert calls(3) == 3
    assert calls.ran == ["ours", "MLX's"]
    assert calls(4) == 4, "no second notice"
    assert backend.refusals == {"product": "matvec_mxfp8: no such type\nline 2"}
    assert calls(5, fails=None) == 5 and calls.ran[-1] == "ours"


def test_lowbit_is_refused(calls, monkeypatch):
    monkeypatch.setattr(backend, "_backend", "lowbit")
    with pytest.raises(_ext.KernelRefused, match="no such type"):
        calls(3)
    assert calls.ran == ["ours"]


def test_doctor_shows_the_words(monkeypatch):
    monkeypatch.setattr(_ext, "has_metal", True, raising=False)
    monkeypatch.setattr(backend, "refusals", {"qqmm": "matmul_nvfp4: no such type"})
    lines = doctor._metal()
    assert lines[0] == "no device" and "not run on an Apple GPU yet" in lines[1]
    assert lines[2] == "refused, MLX's runs: matmul_nvfp4: no such type"


def test_without_metal_nothing_is_wrapped():
    def op():
        pass

    assert not _ext.has_metal and backend.compiled_where_it_runs(op) is op


WITHOUT_EXTENSION = """
import importlib.abc, sys
sys.platform = "darwin"
sys.path.insert(0, {package!r})

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "mlx_lowbit._ext":
            raise ImportError("dlopen: no suitable image found")

sys.meta_path.insert(0, Refuse())
import warnings
import mlx.core as mx, mlx_lowbit
from mlx_lowbit import doctor, formats
warnings.simplefilter("ignore")
mx.set_default_device(mx.cpu)
w = mx.random.normal((96, 128))
for fmt in formats.FORMATS:
    kinds = dict(mode=fmt.mode, bits=fmt.bits, group_size=fmt.group_size)
    parts = mlx_lowbit.quantize(w, **kinds)
    y = mlx_lowbit.quantized_matmul(w, *parts, **kinds)
    dense = mlx_lowbit.linear(w, mlx_lowbit.dequantize(*parts, dtype=mx.float32, **kinds))
    assert mx.allclose(y, dense, rtol=1e-3, atol=1e-3), fmt
    print(fmt.name, fmt.mode, fmt.bits, fmt.group_size, fmt.judged, fmt.nan_scale)
model = mlx_lowbit.nn.QuantizedLinear(128, 64)
mx.eval(model(w))
assert not mlx_lowbit.accelerate(model).replaced
try:
    mlx_lowbit.set_backend("lowbit")
    mlx_lowbit.dequantize(*parts, **kinds)
except RuntimeError as error:
    print("refused:", error)
print(doctor.report())
"""


def test_a_mac_without_the_extension():
    package = str(Path(mlx_lowbit.__file__).parents[1])
    child = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTENSION.format(package=package)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    lines = child.stdout.splitlines()
    for line, fmt in zip(lines, mlx_lowbit.formats.FORMATS, strict=False):
        assert line.split() == [
            str(v)
            for v in (fmt.name, fmt.mode, fmt.bits, fmt.group_size, fmt.judged, fmt.nan_scale)
        ]
    assert "refused: [dequantize]" in child.stdout and "no suitable image" in child.stdout
    assert any(line.startswith("metal") and "no suitable image" in line for line in lines)
