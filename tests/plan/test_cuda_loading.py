"""Finding and loading the CUDA kernels, without a device: each obstacle is named in our words.

A process loads kernels once, so whatever loads them is a child process. The objects are compiled
here, from a few lines that stand for the kernels.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import mlx.core as mx
import mlx_lowbit
import pytest
from mlx_lowbit import _ext, _load, backend, doctor

PACKAGE = Path(mlx_lowbit.__file__).parents[1]
COMPILER = shutil.which("c++") or shutil.which("g++")

# As struct Backend begins; the functions after the first are not called here.
STAND_IN = """
#include <string>
struct Backend { const char* build; std::string (*refusal)(int); void* others[8]; };
static std::string refusal(int device) { return device == 0 ? "REFUSAL" : ""; }
extern "C" const Backend* FUNCTION() {
  static const Backend backend{"BUILD", refusal, {}};
  return &backend;
}
"""


@pytest.fixture
def device(monkeypatch):
    """MLX as on a machine with a CUDA device."""
    monkeypatch.setattr(mx.cuda, "is_available", lambda: True)


def stand_in(folder: Path, build: str = "", refusal: str = "", function="lowbit_cuda_backend"):
    """A shared object that answers as the kernels would."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    text = STAND_IN.replace("BUILD", build or _ext.build)
    source, made = folder / "stand_in.cpp", folder / "stand_in.so"
    source.write_text(text.replace("REFUSAL", refusal).replace("FUNCTION", function))
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", made, source], check=True)
    return made


def child(code: str) -> str:
    """What `code` prints in a process of its own that believes in a CUDA device."""
    head = (
        f"import sys; sys.path.insert(0, {str(PACKAGE)!r})\n"
        "import mlx.core as mx, mlx_lowbit, pathlib\n"
        "from mlx_lowbit import _ext, _load, backend, ops\n"
        "mx.cuda.is_available = lambda: True\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", head + code], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, (run.returncode, run.stderr[-2000:])
    return run.stdout.strip()


def reason(path: Path, after: str = "") -> str:
    """What a process that finds this object says of it, and what `after` prints there."""
    return child(
        f"_load.CUDA_OBJECT = pathlib.Path({str(path)!r})\n"
        f"print(backend.missing_kernel(mx.gpu))\n{after}"
    )


@pytest.mark.skipif(mx.cuda.is_available(), reason="this machine has a CUDA device")
def test_without_a_device():
    said = backend.missing_kernel(mx.gpu)
    assert said is not None and ("no CUDA device" in said or "Metal" in said), said
    assert backend.missing_kernel(mx.cpu) is None


def test_missing_object_says_why_it_was_not_built(tmp_path):
    said = reason(tmp_path / "_cuda.so")
    assert "no CUDA kernels" in said and _ext.cuda_build in said, said


def test_unloadable_object(tmp_path):
    broken = tmp_path / "_cuda.so"
    broken.write_text("no shared object")
    said = reason(broken)
    assert "reinstall" in said and "the loader said" in said and str(broken) in said, said


def test_object_without_the_function(tmp_path):
    said = reason(stand_in(tmp_path, function="something_else"))
    assert "is no CUDA part of mlx_lowbit" in said and "lowbit_cuda_backend" in said, said


def test_object_of_another_build(tmp_path):
    """Both builds are named, and nothing of the object is used."""
    made = stand_in(tmp_path, build="mlx 9.9.9, interface 0")
    said = reason(made, "try: _ext.cuda_refusal(0)\nexcept RuntimeError as error: print(error)")
    said, used = said.split("\n")
    assert "another build" in said and "reinstall" in said, said
    assert _ext.build in said and "mlx 9.9.9, interface 0" in said, said
    assert "no GPU kernels" in used, used


def test_build_names_what_both_sides_were_compiled_with():
    assert _ext.build.startswith(f"mlx {_load.MLX_VERSION}, interface ")


def test_refusal_of_a_device_reaches_the_caller(tmp_path):
    """Per device: the first is refused, the second is not; loading again changes nothing."""
    text = "compute capability 7.5 is below 8.0"
    made = stand_in(tmp_path, refusal=text)
    said = reason(
        made,
        "print(backend.missing_kernel(mx.Device(mx.gpu, 1)))\n"
        f"_ext.load_cuda({str(made)!r}); _ext.load_cuda('/nowhere')\n"
        "mlx_lowbit.set_backend('lowbit')\n"
        "w = mx.quantize(mx.zeros((4, 64)))\n"
        "try: ops.quantized_matmul(mx.zeros((1, 64)), *w, stream=mx.gpu)\n"
        "except RuntimeError as error: print(error)\n",
    )
    first, second, raised = said.splitlines()
    assert text in first and "device 0" in first
    assert second == "None"
    assert raised.startswith("[quantized_matmul] no kernel of mlx_lowbit") and text in raised


@pytest.mark.parametrize(
    ("stream", "index"),
    [
        (mx.cpu, None),
        (mx.Device(mx.cpu, 0), None),
        (mx.gpu, 0),
        (mx.Device(mx.gpu, 0), 0),
        (mx.Device(mx.gpu, 3), 3),
        (mx.Device(mx.gpu, 12), 12),
    ],
    ids=str,
)
def test_number_of_the_gpu(stream, index):
    assert backend._gpu_index(stream) == index


def test_number_of_the_gpu_of_streams():
    for stream in (mx.new_stream(mx.cpu), mx.default_stream(mx.cpu)):
        assert backend._gpu_index(stream) is None


def test_dense_products_never_fall_back_with_a_notice(device, monkeypatch, tmp_path):
    """`linear` routes by itself on a GPU, so the obstacle is none of its business."""
    monkeypatch.setattr(_load, "CUDA_OBJECT", tmp_path / "_cuda.so")
    monkeypatch.setattr(backend, "_gpu_index", lambda stream: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = mlx_lowbit.linear(mx.ones((2, 32)), mx.ones((3, 32)), bias=mx.ones((3,)))
    assert mx.array_equal(y, mx.full((2, 3), 33.0)).item()


def test_missing_driver_is_named_at_import():
    text = "libcuda.so.1: cannot open shared object file: No such file or directory"
    code = f"""
import importlib.abc, sys
sys.path.insert(0, {str(PACKAGE)!r})
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "mlx.core":
            raise ImportError({text!r})
sys.meta_path.insert(0, Refuse())
try:
    import mlx_lowbit
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "no NVIDIA driver" in run.stdout and text in run.stdout, (run.stdout, run.stderr)
    assert f'"mlx[cpu]=={_load.MLX_VERSION}"' in run.stdout


def test_doctor_names_versions_devices_and_obstacles(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    monkeypatch.setattr(_load, "CUDA_OBJECT", tmp_path / "_cuda.so")
    assert doctor.main([]) == 0
    lines = dict.fromkeys(line.split("  ")[0] for line in capsys.readouterr().out.splitlines())
    assert {"mlx", "nanobind-backend", "python", "default device", "cpu", "cuda", "metal"} <= set(
        lines
    )
    said = dict(reversed(doctor.facts()))
    assert said["mlx"] == _load.MLX_VERSION
    assert _ext.target() in said["cpu"] and f"{_ext.threads()} threads" in said["cpu"]
    cuda = [text for subject, text in doctor.facts() if subject == "cuda"]
    assert cuda[0].startswith("no device") and "not in this installation" in cuda[1]
    (tmp_path / "_cuda.so").touch()
    assert any("kernels: installed" in text for _, text in doctor.facts())


def test_doctor_describes_a_device(device, monkeypatch, tmp_path):
    monkeypatch.setattr(_load, "CUDA_OBJECT", tmp_path / "_cuda.so")
    monkeypatch.setattr(mx, "device_count", lambda kind: 1)
    info = {
        "device_name": "Some GPU",
        "compute_capability_major": 8,
        "compute_capability_minor": 9,
        "total_memory": 24_000_000_000,
        "free_memory": 20_000_000_000,
    }
    monkeypatch.setattr(mx, "device_info", lambda which: info)
    cuda = [text for subject, text in doctor.facts() if subject == "cuda"]
    assert "Some GPU" in cuda[0] and "8.9" in cuda[0] and "24.0 GB" in cuda[0]
    assert cuda[1].startswith("this installation has no CUDA kernels")
