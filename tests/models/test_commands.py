"""The commands as a user meets them: bad input is one line and status 1, Ctrl-C keeps the text."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx_lowbit
import numpy as np
import pytest

pytest.importorskip("mlx_lm")
Image = pytest.importorskip("PIL.Image")
soundfile = pytest.importorskip("soundfile")

from mlx_lowbit import convert, demo_models  # noqa: E402

FEW = ("--max-tokens", "4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny models as glm, moxin and asr, plain and converted (-q), a picture, odd files."""
    found = tmp_path_factory.mktemp("commands")
    tiny = {"glm": demo_models.GLM, "moxin": demo_models.MOXIN, "asr": demo_models.QWEN}
    for name, model in tiny.items():
        demo_models.write_checkpoint(model, found / name)
        convert(found / name, found / f"{name}-q", quantize=True, q_bits=model.bits)
    convert(found / "asr", found / "asr-mx", quantize=True, q_mode="mxfp8")
    convert(found / "moxin", found / "moxin-nv", quantize=True, q_mode="nvfp4")
    demo_models.draw(found / "picture.png")
    shutil.copy(demo_models.CLIP, found / "clip.ogg")
    sound = np.sin(np.arange(16000) * 0.05).astype(np.float32)
    soundfile.write(
        found / "nan.wav", np.where(np.arange(16000) == 5, np.nan, sound), 16000, "FLOAT"
    )
    (found / "text.png").write_text("hello")
    (found / "cut.png").write_bytes((found / "picture.png").read_bytes()[:200])
    return found


def run(folder, capsys, name, *arguments):
    """(status, what it printed, its error) of a command inside the folder."""
    capsys.readouterr()
    before = Path.cwd()
    os.chdir(folder)
    try:
        status = importlib.import_module(f"mlx_lowbit.{name}").main(list(arguments))
    finally:
        os.chdir(before)
    return status, *capsys.readouterr()


GENERATE = ("generate", "--model", "glm-q", *FEW)
DESCRIBE = ("describe", "picture.png", *FEW, "--model")
TRANSCRIBE = ("transcribe", "clip.ogg", *FEW, "--model")
REFUSED = [
    ((*GENERATE, "-qa"), "is in mode 'affine'"),
    (("generate", "--model", "glm", *FEW, "-qa"), "the model is not quantized"),
    ((*DESCRIBE, "moxin-q", "-qa"), "is in mode 'affine'"),
    ((*TRANSCRIBE, "asr-q", "-qa"), "is in mode 'affine'"),
    ((*TRANSCRIBE, "asr", "-qa"), "the model is not quantized"),
    ((*GENERATE, "--bits", "4"), "quantized already"),
    (("generate", "--model", "glm", *FEW, "--bits", "7"), "bits must be one of"),
    (("generate", "--model", "glm", *FEW, "--q-mode", "int4"), "mode must be one of"),
    (("generate", "--model", "asr-q", *FEW), "asr-q: such a model is for mlx_lowbit.transcribe"),
    (("generate", "--model", "moxin-q", *FEW), "moxin-q: such a model is for mlx_lowbit.describe"),
    (("generate", "--model", "nowhere/", *FEW), "no such directory"),
    ((*GENERATE, "-p", "x" * 5000), "5000 tokens, and this model has positions for 4096"),
    (
        (*GENERATE, "--kv-bits", "8"),
        "kv_group_size must divide the 32 dimensions of a head, got 64",
    ),
    (
        (*GENERATE, "--kv-bits", "8", "--kv-group-size", "32", "--max-kv-size", "9"),
        "kv_bits and max_kv_size exclude each other",
    ),
    ((*GENERATE, "--temp", "-1"), "temp must be at least 0"),
    ((*GENERATE, "--temp", "1", "--top-p", "3"), "top_p must be between 0 and 1"),
    ((*GENERATE, "--max-tokens", "0"), "max_tokens must be at least 1"),
    (("describe", "text.png", *FEW, "--model", "moxin-q"), "text.png: not an image"),
    (("describe", "cut.png", *FEW, "--model", "moxin-q"), "cut.png: cannot be read as an image"),
    (("describe", "clip.ogg", *FEW, "--model", "moxin-q"), "clip.ogg: not an image"),
    ((*DESCRIBE, "glm-q"), "does not see images"),
    ((*TRANSCRIBE, "glm-q"), "does not hear"),
    (("transcribe", "nan.wav", *FEW, "--model", "asr-q"), "nan.wav: sample 5 is nan"),
    (("transcribe", "picture.png", *FEW, "--model", "asr-q"), "picture.png: not a sound file"),
    ((*TRANSCRIBE, "asr-q", "--clip-seconds", "0"), "expected at least 1, got 0"),
    ((*TRANSCRIBE, "asr-q", "-o", "no/file.txt"), "expected a file in a directory that exists"),
    ((*TRANSCRIBE, "asr-q", "-o", "glm"), "glm: expected a file"),
    (("convert", "--hf-path", "glm", "--mlx-path", "asr", "-q"), "asr: already exists"),
    (("convert", "--hf-path", "glm", "--mlx-path", "new", "-q", "-d"), "exclude each other"),
    (("convert", "--hf-path", "glm-q", "--mlx-path", "new", "-q"), "quantized already"),
    (
        ("convert", "--hf-path", "glm", "--mlx-path", "new", "-q", "--q-mode", "int4"),
        "mode must be one of affine, mxfp4, mxfp8, nvfp4, got 'int4'",
    ),
    (("convert", "--hf-path", "glm", "--mlx-path", "text.png/new", "-q"), "text.png"),
]


@pytest.mark.parametrize("arguments, message", REFUSED, ids=lambda value: None)
def test_bad_input_is_one_line_and_status_1(folder, capsys, arguments, message):
    before = sorted(folder.iterdir())
    status, printed, error = run(folder, capsys, *arguments)
    assert status == 1 and message in error and error.count("\n") == 1, error
    assert error.startswith(f"mlx_lowbit.{arguments[0]}: ")
    assert printed == "" or arguments[0] == "convert"
    assert sorted(folder.iterdir()) == before, "something was left behind"


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_settings_that_are_no_object_are_a_wrong_option(folder, capsys, text):
    with pytest.raises(SystemExit) as exit_of:
        run(folder, capsys, *GENERATE, "--chat-template-config", text)
    assert exit_of.value.code == 2 and "JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        (*DESCRIBE, "moxin-nv", "-qa"),
        (*DESCRIBE, "moxin-nv"),
        (*TRANSCRIBE, "asr-mx", "-qa"),
        ("generate", "--model", "glm", *FEW, "--q-mode", "mxfp8", "-qa"),
        ("generate", "--model", "glm", *FEW, "--q-mode", "nvfp4"),
    ],
    ids=lambda value: " ".join(value),
)
def test_quantized_activations_run(folder, capsys, arguments):
    status, printed, error = run(folder, capsys, *arguments)
    assert status == 0 and "Generation: 4 tokens" in printed and error == ""


@pytest.mark.parametrize("mode", ["CMYK", "LA", "1", "P", "I;16", "F"])
def test_pictures_of_every_kind(folder, capsys, mode):
    file = folder / f"{mode.replace(';', '')}.{'jpg' if mode == 'CMYK' else 'tiff'}"
    Image.new(mode, (20, 1)).save(file)
    status, printed, _ = run(folder, capsys, "describe", file.name, *FEW, "--model", "moxin-q")
    file.unlink()
    assert status == 0 and "Generation: 4 tokens" in printed


def test_ctrl_c_ends_with_the_text_so_far(folder):
    package = str(Path(mlx_lowbit.__file__).parents[1])
    # The tiny model's end token would stop it long before.
    settings = json.loads((folder / "glm-q" / "config.json").read_text()) | {"eos_token_id": [300]}
    endless = folder / "endless"
    shutil.copytree(folder / "glm-q", endless)
    (endless / "config.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "mlx_lowbit.generate", "--model", str(endless)]
    child = subprocess.Popen(
        [*command, "--max-tokens", "100000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": package, "PYTHONUNBUFFERED": "1"},
    )
    assert child.stdout is not None
    first = child.stdout.read(1)
    child.send_signal(signal.SIGINT)
    rest, error = child.communicate(timeout=60)
    shutil.rmtree(endless)
    assert first and b"tokens-per-sec" in rest and b"Traceback" not in error
    assert child.returncode == 130
