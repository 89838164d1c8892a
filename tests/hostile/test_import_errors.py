"""Importing beside a wrong or incomplete installation: an ImportError with the mending command.

Each case is a child process that arranges the defect before it imports the package.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import mlx_lowbit
import pytest
from mlx_lowbit import _load

PRELUDE = f"""
import importlib.abc, importlib.metadata, sys, types
sys.path.insert(0, {str(Path(mlx_lowbit.__file__).parents[1])!r})

class Refuse(importlib.abc.MetaPathFinder):
    def __init__(self, name, text):
        self.name, self.text = name, text
    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            raise ImportError(self.text)

def pretend(distribution, version):
    real = importlib.metadata.version
    def answer(name):
        if name != distribution:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version
    importlib.metadata.version = answer
"""

IMPORT = """
try:
    import mlx_lowbit
except ImportError as error:
    print(error)
    print("cause:", type(error.__cause__).__name__)
else:
    print("imported")
"""

NO_LIBMLX = "libmlx.so: cannot open shared object file: No such file or directory"
STUB = "sys.modules['mlx_lowbit._ext'] = stub = types.ModuleType('mlx_lowbit._ext')\n"


def message(defect: str) -> str:
    """What the import prints beside `defect`."""
    child = subprocess.run(
        [sys.executable, "-c", PRELUDE + defect + IMPORT],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, (child.returncode, child.stderr[-2000:])
    return child.stdout


def test_without_a_defect_it_imports():
    assert message("").strip() == "imported"


def test_missing_libmlx_names_the_extras():
    said = message(f"sys.meta_path.insert(0, Refuse('mlx.core', {NO_LIBMLX!r}))\n")
    for command in ('"mlx-lowbit[cpu]"', '"mlx-lowbit[cuda13]"'):
        assert f"pip install {command}" in said
    assert NO_LIBMLX in said and "cause: ImportError" in said


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "0.32.4.dev1"])
def test_another_mlx_is_named_before_the_extension_loads(version):
    """Loading an extension built for another C++ interface could end the process."""
    said = message(
        f"pretend('mlx', {version!r})\n"
        "sys.meta_path.insert(0, Refuse('mlx_lowbit._ext', 'the extension was loaded'))\n"
    )
    assert f"installed mlx {version}." in said
    for extra in ("cpu", "cuda13"):
        assert f'pip install "mlx[{extra}]=={_load.MLX_VERSION}"' in said
    assert "the extension was loaded" not in said


def test_mlx_without_metadata_is_another_mlx():
    assert "installed mlx none." in message("pretend('mlx', None)\n")


def test_unloadable_extension_says_what_the_loader_said():
    text = "undefined symbol: _ZN3mlx4core5arrayD1Ev"
    said = message(f"sys.meta_path.insert(0, Refuse('mlx_lowbit._ext', {text!r}))\n")
    assert text in said and "pip install --force-reinstall mlx-lowbit" in said
    assert f"mlx {_load.MLX_VERSION}" in said and "cause: ImportError" in said


@pytest.mark.parametrize("version", ["1.1.0", None])
def test_another_nanobind_backend_is_named_before_the_extension_loads(version):
    said = message(
        f"pretend('nanobind-backend', {version!r})\n"
        "sys.meta_path.insert(0, Refuse('mlx_lowbit._ext', 'the extension was loaded'))\n"
    )
    assert f"got {version or 'none'}." in said and "the extension was loaded" not in said
    assert f"pip install nanobind-backend=={_load.NANOBIND_BACKEND_VERSION}" in said


def test_another_array_type_names_what_to_install():
    said = message(
        STUB + "def refuse(a):\n"
        "    raise TypeError('same_array(): incompatible function arguments')\n"
        "stub.same_array = refuse\n"
    )
    assert f"pip install nanobind-backend=={_load.NANOBIND_BACKEND_VERSION}" in said
    first, *_ = said.splitlines()
    assert "incompatible function arguments" not in first and "cause: TypeError" in said
