"""Malformed checkpoints: refused before anything is computed, with the file and tensor named."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))  # checkpoint_values

from checkpoint_values import (
    INDEX,
    MODEL,
    checkpoint,
    config,
    new_model,
    parameters,
    published,
    write,
)
from mlx_lowbit.checkpoint import Checkpoint, read_header
from mlx_lowbit.load import load

pytest.importorskip("mlx_lm")
pytest.importorskip("transformers")

Header = dict[str, Any]
VALUE = "model.layers.2.self_attn.v_proj"
BLOCK = {"group_size": 64, "bits": 4, "mode": "affine"}


def raw(header: Header | bytes, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(begin: int, end: int, shape: Any = (4,), dtype: str = "F32") -> Header:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# name -> (the file's bytes, what is said of it)
FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes end within the header"),
    "short": (b"\x01\x00", "2 bytes end within the header"),
    "text": (b"this is a text file of some length\n" * 9, "truncated, or no safetensors file"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "header past the end": (struct.pack("<Q", 2**40) + b"{}", "truncated"),
    "header of 2^63": (struct.pack("<Q", 2**63) + b"{}", "truncated"),
    "no JSON": (raw(b"{a: 1}"), "the header is no JSON"),
    "no UTF-8": (raw(b'{"\xff": 1}'), "the header is no JSON"),
    "an array": (raw(b"[1, 2]"), "no JSON object"),
    "truncated data": (raw({"a": tensor(0, 16)}, b"\0" * 12), "'a': its bytes end at 16"),
    "reversed": (raw({"a": tensor(16, 0)}, b"\0" * 16), "'a': data_offsets"),
    "negative offset": (raw({"a": tensor(-16, 0)}, b"\0" * 16), "'a': data_offsets"),
    "wrapping offset": (raw({"a": tensor(2**64 - 32, 2**64 - 16)}, b"\0" * 16), "'a': its bytes"),
    "fewer bytes": (raw({"a": tensor(0, 16, [5])}, b"\0" * 16), "'a': F32 [5] needs 20 bytes"),
    "a fraction": (raw({"a": tensor(0, 16, [4.5])}, b"\0" * 16), "'a': shape"),
    "negative sizes": (raw({"a": tensor(0, 16, [-2, -2])}, b"\0" * 16), "'a': shape"),
    "2^32 + 4": (raw({"a": tensor(0, 16, [2**32 + 4])}, b"\0" * 16), "'a': F32 [4294967300]"),
    "2^64": (raw({"a": tensor(0, 0, [65536] * 4)}), "'a': F32 [65536"),
    "unknown dtype": (raw({"a": tensor(0, 16, dtype="F99")}, b"\0" * 16), "'a': dtype 'F99'"),
    "F4": (raw({"a": tensor(0, 16, [32], "F4")}, b"\0" * 16), "'a': dtype"),
    "F64": (raw({"a": tensor(0, 16, [2], "F64")}, b"\0" * 16), "'a': dtype 'F64' is not supported"),
    "no entry": (raw({"a": 7}, b""), "'a': expected an object"),
    "no dtype": (raw({"a": {"shape": [4], "data_offsets": [0, 16]}}, b"\0" * 16), "'a': dtype"),
    "twice": (
        raw(b'{"a":%s,"a":%s}' % ((json.dumps(tensor(0, 16)).encode(),) * 2), b"\0" * 16),
        "'a' is in it twice",
    ),
    "overlap": (
        raw({"a": tensor(0, 16), "b": tensor(8, 24)}, b"\0" * 24),
        "'b': overlaps 'a'",
    ),
    "gap": (raw({"a": tensor(0, 16), "b": tensor(20, 36)}, b"\0" * 36), "'b': leaves a gap"),
    "trailing bytes": (raw({"a": tensor(0, 16)}, b"\0" * 20), "4 bytes after the last tensor 'a'"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path, name):
    content, said = FILES[name]
    path = checkpoint(tmp_path) / MODEL
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and said in message and "\n" not in message


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("small") / "a.safetensors"
    arrays = {"a": mx.arange(12, dtype=mx.float32).reshape(3, 4), "b": mx.ones((2, 0, 3))}
    mx.save_safetensors(str(path), arrays | {"c": mx.array([1, 2, 3], dtype=mx.uint8)})
    return path.read_bytes()


@given(data=st.data())
def test_damaged_files_load_or_are_refused(file, tmp_path, data):
    """Whatever the library lets through has shapes that its bytes hold."""
    damaged = bytearray(file)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(file) - 1))
        damaged[place] = data.draw(st.sampled_from([0, 45, 48, 49, 57, 91, 93, 44, 255]))
    damaged = (
        damaged[: data.draw(st.integers(0, len(file)))] if data.draw(st.booleans()) else damaged
    )
    path = tmp_path / MODEL
    path.write_bytes(damaged)
    try:
        weights = Checkpoint.open(tmp_path).load()
    except ValueError as error:
        assert str(error).startswith(f"{path}: ")
        return
    for value in weights.values():
        assert value.nbytes <= len(damaged) and mx.sum(value).item() is not None


# --- shards and index ---------------------------------------------------------------------------


def shards(directory: Path) -> Path:
    settings = config()
    return write(directory, published(new_model(settings)), settings, shards=3)


def indexed(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return edit


def replaced(name: str) -> Callable[[Path], None]:
    return indexed(lambda index: index["weight_map"].update({f"{VALUE}.weight": name}))


def twice(directory: Path) -> None:
    (directory / INDEX).unlink()
    mx.save_safetensors(str(directory / "model-9.safetensors"), {f"{VALUE}.weight": mx.ones(3)})


SECOND = "model-00002-of-00003.safetensors"
DIRECTORIES: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    # what is done, the file that is named, what is said of it
    "a missing shard": (lambda d: (d / SECOND).unlink(), SECOND, "no such file; model.safetensors.i"),
    "a truncated shard": (
        lambda d: (d / SECOND).write_bytes((d / SECOND).read_bytes()[:-100]),
        SECOND,
        "an incomplete download?",
    ),
    "a shard outside": (replaced("../secret.safetensors"), INDEX, "expected a file of this directory"),
    "an absolute shard": (replaced("/etc/a.safetensors"), INDEX, "expected a file of this directory"),
    "a shard of Windows": (replaced("..\\a.safetensors"), INDEX, "expected a file of this directory"),
    "another file": (replaced("config.json"), INDEX, "expected a .safetensors file"),
    "no file name": (replaced(3), INDEX, "expected a file of this directory: 3"),  # type: ignore[arg-type]
    "a tensor in no shard": (
        indexed(lambda i: i["weight_map"].update(other=SECOND)), SECOND, "tensor 'other', which the",
    ),
    "no weight_map": (indexed(lambda i: i.pop("weight_map")), INDEX, "expected weight_map"),
    "an empty weight_map": (indexed(lambda i: i.update(weight_map={})), INDEX, "expected weight_map"),
    "no JSON": (lambda d: (d / INDEX).write_text("{"), INDEX, "no JSON"),
    "no text": (lambda d: (d / INDEX).write_bytes(b"\xff\xfe"), INDEX, "no JSON"),
    "a tensor twice": (twice, "model-9.safetensors", "is in model-0000"),
    "no weights": (lambda d: [f.unlink() for f in d.glob("model*")], "", "no weights"),
    "config.json missing": (lambda d: (d / "config.json").unlink(), "config.json", "no such file"),
    "config.json cut": (lambda d: (d / "config.json").write_text('{"a'), "config.json", "no JSON"),
    "config.json an array": (
        lambda d: (d / "config.json").write_text("[]"), "config.json", "expected an object, got list",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DIRECTORIES)
def test_directories(tmp_path, name):
    change, file, said = DIRECTORIES[name]
    change(shards(tmp_path))
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / file}: ") and said in message and "\n" not in message


# --- tensors that do not fit the configuration --------------------------------------------------


def array(*shape: int, dtype: mx.Dtype = mx.bfloat16) -> mx.array:
    return mx.zeros(shape, dtype)


TENSORS: dict[str, tuple[dict[str, mx.array | None], str, str]] = {
    # changes of tensors (None removes one), the tensor that is named, what is said
    "missing": ({f"{VALUE}.weight": None}, f"{VALUE}.weight", "1 tensors missing"),
    "unexpected": ({"model.other.weight": array(2)}, "model.other.weight", "1 tensors unexpected"),
    "another shape": ({f"{VALUE}.weight": array(64, 64)}, f"{VALUE}.weight", "floats [64, 128], got"),
    "transposed": ({f"{VALUE}.weight": array(128, 64)}, f"{VALUE}.weight", "[64, 128], got bfloat16 [128"),
    "integers": (
        {f"{VALUE}.weight": array(64, 128, dtype=mx.int32)}, f"{VALUE}.weight", "got int32",
    ),
    "codes": (
        {f"{VALUE}.weight": array(64, 16, dtype=mx.uint32)}, f"{VALUE}.weight", "got uint32",
    ),
    "an expert": (
        {"model.layers.1.mlp.experts.2.up_proj.weight": None},
        "model.layers.1.mlp.experts.2.up_proj.weight", "7 of 8 experts",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
def test_tensors(tmp_path, name):
    changes, tensor, said = TENSORS[name]
    weights = published(new_model(config())) | changes
    write(tmp_path, {n: v for n, v in weights.items() if v is not None}, config())
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    message = str(error.value)
    held = changes[tensor] is not None
    where = tmp_path / MODEL if held else tmp_path
    assert message.startswith(f"{where}: tensor {tensor!r}: ") and said in message


@pytest.mark.parametrize("name", ["another shape", "transposed", "integers", "codes"])
def test_tensors_that_are_to_be_quantized(tmp_path, name):
    """The shape of the file's tensor is told, not that of its codes."""
    changes, tensor, said = TENSORS[name]
    write(tmp_path, published(new_model(config())) | changes, config())
    with pytest.raises(ValueError) as error:
        load(tmp_path, bits=4)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / MODEL}: tensor {tensor!r}: ") and said in message


QUANTIZED: dict[str, tuple[dict[str, mx.array | None], dict[str, Any], str]] = {
    # changes of VALUE's tensors, of the configuration's block, what is said
    "scales alone": ({"weight": None}, {}, f"no {VALUE}.weight"),
    "no biases": ({"biases": None}, {}, f"'{VALUE}.biases': missing in affine 4-bit"),
    "codes too narrow": ({"weight": array(64, 12, dtype=mx.uint32)}, {}, "they fit affine 3-bit"),
    "codes of no width": (
        {"weight": array(64, 13, dtype=mx.uint32)}, {}, "uint32 [64, 16] and scales [64, 2]",
    ),
    "too few rows": ({"scales": array(63, 2)}, {}, "got uint32 [64, 16] and bfloat16 [63, 2]"),
    "no group": ({"scales": array(64, 0)}, {}, "and bfloat16 [64, 0]"),
    "scales for two dimensions more": ({"scales": array(64, 2, 1)}, {}, "bfloat16 [64, 2, 1]"),
    "codes in floats": ({"weight": array(64, 16)}, {}, "got bfloat16 [64, 16]"),
    "whole scales": ({"scales": array(64, 2, dtype=mx.int32)}, {}, "int32 [64, 2]"),
    "bytes as scales": ({"scales": array(64, 2, dtype=mx.uint8)}, {}, "uint8 [64, 2]"),
    "said to be plain": ({}, {VALUE: False}, "is not quantized"),
    "said to be 8-bit": ({}, {VALUE: {"bits": 8}}, "they fit affine 4-bit, groups of 64"),
    "said, not there": (
        {"weight": array(64, 128), "scales": None, "biases": None}, {VALUE: BLOCK},
        f"'{VALUE}.scales': missing; the configuration says affine 4-bit",
    ),
    "biases of other rows": ({"biases": array(64, 1)}, {}, "floats [64, 2], got bfloat16 [64, 1]"),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_tensors(tmp_path, name):
    changes, stated, said = QUANTIZED[name]
    model = new_model(config())
    mlx_nn.quantize(model, 64, 4)
    weights = parameters(model) | {f"{VALUE}.{kind}": value for kind, value in changes.items()}
    if name == "codes too narrow":
        stated = {VALUE: BLOCK}  # unnamed, it would be loaded as what it is
    settings = config(quantization=BLOCK | stated)
    write(tmp_path, {n: v for n, v in weights.items() if v is not None}, settings)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert f"tensor '{VALUE}." in str(error.value) and said in str(error.value)


def test_biases_in_a_block_mode(tmp_path):
    model = new_model(config())
    mlx_nn.quantize(model, mode="mxfp8")
    weights = parameters(model) | {f"{VALUE}.biases": array(64, 4)}
    write(tmp_path, weights, config(quantization={"mode": "mxfp8"}))
    with pytest.raises(ValueError, match=rf"'{VALUE}.biases': unexpected in mxfp8"):
        load(tmp_path)


def test_unquantized_weights_in_a_model_said_to_be_quantized(tmp_path):
    """Only layers with scales are quantized, so it loads."""
    write(tmp_path, published(new_model(config())), config(quantization=BLOCK))
    model, _ = load(tmp_path)
    assert "scales" not in model.lm_head


BLOCKS = {
    "no object": (4, "quantization: expected an object, got 4"),
    "no bits": (BLOCK | {"bits": 0}, "quantization: bits must be one of"),
    "7 bits": (BLOCK | {"bits": 7}, "quantization: bits must be one of"),
    "true bits": (BLOCK | {"bits": True}, "quantization: bits must be a whole number, got True"),
    "a string": (BLOCK | {"bits": "4"}, "quantization: bits must be a whole number"),
    "a list": (BLOCK | {"bits": [4]}, "quantization: bits must be a whole number"),
    "groups of 256": (BLOCK | {"group_size": 256}, "quantization: group_size must be one of"),
    "a fraction": (BLOCK | {"group_size": 64.0}, "quantization: group_size must be a whole number"),
    "unknown mode": (BLOCK | {"mode": "int4"}, "quantization: mode must be one of"),
    "no mode": (BLOCK | {"mode": 7}, "quantization: mode must be a string"),
    "mxfp8 in fours": ({"mode": "mxfp8", "bits": 4}, "quantization: bits must be one of 8"),
    "a layer's bits": (BLOCK | {VALUE: {"bits": 9}}, f"quantization: {VALUE}: bits must be one of"),
    "a layer's string": (BLOCK | {VALUE: "false"}, f"quantization: {VALUE}: expected an object or"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks(tmp_path, name):
    block, said = BLOCKS[name]
    model = new_model(config())
    mlx_nn.quantize(model, 64, 4)
    write(tmp_path, parameters(model), config(quantization=block))
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    assert str(error.value).startswith(f"config.json: {said}")


# --- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a missing shard", "a truncated shard", "config.json cut"])
def test_the_command_says_one_line_and_writes_nothing(tmp_path, name, capsys):
    from mlx_lowbit.convert import main

    DIRECTORIES[name][0](shards(tmp_path / "source"))
    target = tmp_path / "target"
    assert main(["--model", str(tmp_path / "source"), "--mlx-path", str(target), "-q"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("mlx_lowbit.convert: ") and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_reading_a_header_reads_no_tensor(tmp_path):
    path = tmp_path / MODEL
    header = {"a": tensor(0, 2**33, [2**31])}
    path.write_bytes(raw(header))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 2**33)  # a hole of 8 GiB
    with pytest.raises(ValueError, match=r"'a': shape \[2147483648\] is too large"):
        read_header(path)
