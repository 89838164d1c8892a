"""Configurations, tokenizers and places to write that do not fit: refused by name, nothing left."""

from __future__ import annotations

import importlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("mlx_lm")
pytest.importorskip("transformers")

import tiny_tokenizer
from checkpoint_values import assert_same, checkpoint
from mlx_lowbit import cli, convert, demo_models, load, save


def settings(directory: Path, **changes: Any) -> Path:
    """`directory` with changes of its config.json; ... removes a key."""
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return directory


LLAMA = {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": "3"}, r"num_hidden_layers: expected a positive integer"),
        ({"num_hidden_layers": 2**40}, rf"num_hidden_layers: {2**40} layers, and the files hold"),
        (LLAMA | {"num_hidden_layers": 2**40}, r"num_hidden_layers: \d+ layers, and the files"),
        ({"quantization": {"mode": "int8"}}, r"quantization: mode must be one of"),
        ({"quantization": {"mode": "mxfp8", "bits": 4}}, r"quantization: bits must be one of 8"),
        (LLAMA | {"vocab_size": ...}, r"it does not fit the model: .*'vocab_size'"),
        (LLAMA | {"num_hidden_layers": "x"}, r"it does not fit the model"),
        (LLAMA | {"num_attention_heads": 0}, r"it does not fit the model"),
    ],
)
def test_values_of_a_configuration(tmp_path, changes, said):
    with pytest.raises(ValueError, match=f"^config.json: {said}"):
        load(settings(checkpoint(tmp_path), **changes))


@pytest.mark.parametrize("value", ["</s>", [1, "2"], True, {"id": 1}])
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_end_tokens_that_are_no_ids(tmp_path, file, value):
    path = checkpoint(tmp_path)
    if file == "config.json":
        settings(path, eos_token_id=value)
    else:
        (path / file).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=rf"{file}: eos_token_id: expected an id or a list"):
        load(path)


def test_no_path():
    with pytest.raises(FileNotFoundError, match=r"^path: expected a directory"):
        load("")


def test_no_command_touches_the_network_for_a_directory(tmp_path, monkeypatch):
    asked: list[Any] = []

    def refuse(*address: Any, **named: Any) -> None:
        asked.append(address)
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for name, tiny in (("asr", demo_models.QWEN), ("vlm", demo_models.MOXIN)):
        demo_models.write_checkpoint(tiny, tmp_path / name)
        convert(tmp_path / name, tmp_path / f"{name}-q", quantize=True, q_mode="mxfp8")
        model, processor = load(tmp_path / f"{name}-q", quantize_activations=True)
        again, _ = load(save(model, tmp_path / f"{name}-saved", processor))
        assert_same(again, model)
    assert asked == []


# --- what is written ----------------------------------------------------------------------------


@pytest.mark.parametrize("inside", ["new", "additional_chat_templates/new", "."])
def test_nothing_is_written_into_the_source(tmp_path, inside):
    source = checkpoint(tmp_path / "source")
    model, _ = load(source, bits=4)
    before = sorted(source.rglob("*"))
    for write in (lambda p: convert(source, p), lambda p: save(model, p)):
        with pytest.raises((ValueError, FileExistsError), match=str(source)):
            write(source / inside)
    assert sorted(source.rglob("*")) == before


def test_places_that_cannot_be_written_are_refused_first(tmp_path, monkeypatch):
    source = checkpoint(tmp_path / "source")
    (tmp_path / "file").write_text("")
    module = importlib.import_module("mlx_lowbit.convert")
    monkeypatch.setattr(module, "open_model", lambda *a, **k: pytest.fail("too late"))
    with pytest.raises(NotADirectoryError, match=f"new: cannot be made, since {tmp_path}/file is"):
        convert(source, tmp_path / "file" / "new")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match=f"since {tmp_path} cannot be written"):
        convert(source, tmp_path / "new" / "place")


def test_a_failure_removes_the_folders_it_made(tmp_path, monkeypatch):
    model, _ = load(checkpoint(tmp_path / "source"), bits=4)
    for error in (RuntimeError, KeyboardInterrupt):

        def fail(*arguments: Any, error: Any = error, **named: Any) -> None:
            raise error

        monkeypatch.setattr(importlib.import_module("mlx_lowbit.save"), "card", fail)
        with pytest.raises(error):
            save(model, tmp_path / "new" / "folders" / "saved")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"q_bits": 0}, "need quantize"),
        ({"q_mode": "mxfp8"}, "q_mode need quantize"),
        ({"quantize": True, "quant_predicate": "mixed_3_6", "q_bits": 8}, "q_bits: expected none"),
    ],
)
def test_options_that_contradict_each_other(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        convert(tmp_path, tmp_path / "new", **options)


# --- what commands share ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError("out of\nmemory"), "name: out of memory"),
        (FileNotFoundError(2, "No such file", "a.png"), "name: a.png: No such file"),
        (KeyError("a key"), "name: a key"),
        (OSError("plain"), "name: plain"),
        (ValueError(), "name: ValueError"),
    ],
)
def test_errors_as_one_line(error, line, capsys):
    import argparse

    def fail(options: argparse.Namespace) -> int:
        raise error

    assert cli.run("name", fail, argparse.ArgumentParser(), []) == 1
    assert capsys.readouterr().err == f"{line}\n"


def test_a_reader_that_has_enough(tmp_path):
    """As in ``mlx_lowbit.generate ... | head -1``: no message, no traceback at the end."""
    import subprocess
    import sys

    code = (
        "import argparse, sys; from mlx_lowbit import cli\n"
        "def show(options):\n"
        "    for _ in range(100000): print('words', flush=True)\n"
        "sys.exit(cli.run('name', show, argparse.ArgumentParser(), []))\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        assert child.stdout is not None and child.stderr is not None
        child.stdout.readline()
        child.stdout.close()
        assert child.stderr.read() == b"" and child.wait(timeout=60) == 1


def test_a_tokenizer_with_more_ids_than_rows_is_refused_at_the_prompt(tmp_path):
    """Its own size does not count what was added to it."""
    from mlx_lowbit import generate
    from mlx_lowbit.generate import prompt_tokens

    path = checkpoint(tmp_path, vocab_size=tiny_tokenizer.VOCABULARY - 3)
    model, tokenizer = load(path, bits=4)
    with pytest.raises(ValueError, match=r"another model's: it gives the id \d+.* has 259"):
        generate(model, tokenizer, prompt_tokens(tokenizer, "hi"), max_tokens=1)
    assert isinstance(generate(model, tokenizer, "hi", max_tokens=1), str)


@pytest.mark.cpu
def test_experts_that_do_not_run_on_a_cpu_are_refused(tmp_path, capsys):
    path, command = checkpoint(tmp_path), importlib.import_module("mlx_lowbit.generate")
    assert command.main(["--model", str(path), "-m", "1"]) == 1
    error = capsys.readouterr().err
    assert "_proj: experts in bfloat16 do not run on a CPU; quantize them" in error
    assert command.main(["--model", str(path), "-m", "1", "--q-bits", "4"]) == 0
    model, _ = load(path)
    model.set_dtype(mx.float32)
    command.check_experts(model)
