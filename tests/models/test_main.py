"""python -m mlx_lowbit, and the scripts of the same names."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from mlx_lowbit import __main__ as commands

tomllib = pytest.importorskip("tomllib")
PROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_every_command_is_a_script():
    scripts = tomllib.loads(PROJECT.read_text())["project"]["scripts"]
    assert scripts == {f"mlx_lowbit.{n}": f"mlx_lowbit.{n}:main" for n in commands.COMMANDS}


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        commands.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"mlx_lowbit.{name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_arguments_go_to_the_command(name, monkeypatch):
    module = importlib.import_module(f"mlx_lowbit.{name}")
    monkeypatch.setattr(module, "main", lambda argv: (argv, 7))
    assert commands.main([name, "-x", "y"]) == (["-x", "y"], 7)


@pytest.mark.parametrize("argv, status", [(["fly"], 2), (["--help"], 0), ([], 0)])
def test_what_is_no_command(argv, status, monkeypatch, capsys):
    monkeypatch.setattr(commands.sys, "argv", ["mlx_lowbit"])
    assert commands.main(argv) == status
    out, err = capsys.readouterr()
    assert "transcribe" in (err if status else out)


def test_the_package_imports_nothing_heavy():
    heavy = ("mlx_lm", "transformers", "torch", "numpy", "PIL", "soundfile", "huggingface_hub")
    code = f"import sys, mlx_lowbit; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done
