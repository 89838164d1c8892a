"""mlx_lowbit.describe from files to text: the model, the command and its refusals."""

from __future__ import annotations

import importlib
import json

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm")
pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

import moxin_values as values
import tiny_tokenizer
from mlx_lowbit import load
from PIL import Image

command = importlib.import_module("mlx_lowbit.describe")
TEXT = {"vocab_size": 288}
PAD, TOKENS = 280, 10


@pytest.fixture(scope="module")
def composite():
    return values.Composite(text=TEXT)


@pytest.fixture(scope="module")
def directory(composite, tmp_path_factory):
    """A checkpoint as published, in float32."""
    found = tmp_path_factory.mktemp("vlm")
    config = {**values.CONFIG, "pad_token_id": PAD, "text_config": {**values.TEXT, **TEXT}}
    (found / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(found / "model.safetensors"), composite.published())
    tiny_tokenizer.write(found, template=None)
    return found


@pytest.fixture(scope="module")
def loaded(directory):
    return load(directory)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A picture with an alpha channel that is not square."""
    rng = np.random.default_rng(0)
    file = tmp_path_factory.mktemp("png") / "picture.png"
    Image.fromarray(rng.integers(0, 256, (50, 70, 4), np.uint8), "RGBA").save(file)
    return file


def test_tokens_are_those_of_the_composite(composite, loaded, image):
    model, processor = loaded
    inputs = processor("What is it?", image)
    own = [t for t in inputs.tokens if t != PAD]
    want = composite.greedy(np.array([own]), inputs.pixel_values, TOKENS)
    pieces = list(
        command.stream_describe(model, processor, image, "What is it?", max_tokens=TOKENS)
    )
    got = [p.token for p in pieces]
    ends = [i for i, t in enumerate(want) if t in processor.tokenizer.eos_token_ids]
    assert got == (want[: ends[0] + 1] if ends else want)
    whole = command.describe(model, processor, image, "What is it?", max_tokens=TOKENS)
    assert whole == "".join(p.text for p in pieces).strip()


def test_the_command_prints_text_and_statistics(directory, image, capsys):
    arguments = [str(image), "--model", str(directory), "-m", "4"]
    assert command.main([*arguments, "--q-bits", "8", "--q-group-size", "32"]) == 0
    text = capsys.readouterr().out
    assert "==========\nPrompt: " in text and "Peak memory: " in text


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_bad_images_are_one_line_and_status_1(directory, tmp_path, capsys, content):
    file = tmp_path / "picture.png"
    file.write_bytes(content)
    for path in (file, tmp_path / "missing.png", tmp_path):
        assert command.main([str(path), "--model", str(directory)]) == 1
        printed, error = capsys.readouterr()
        assert printed == "" and error.count("\n") == 1 and path.name in error


def test_an_empty_prompt_is_refused(directory, image, capsys):
    assert command.main([str(image), "--model", str(directory), "-p", " "]) == 1
    assert "question" in capsys.readouterr().err


def test_models_that_do_not_see_are_refused(image):
    import mlx.nn as nn

    with pytest.raises(ValueError, match="does not see"):
        command.describe(nn.Linear(2, 2), None, image)
