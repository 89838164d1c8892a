"""The demo's tiny models through the commands, with a drawn picture and a spoken sentence."""

from __future__ import annotations

import re

import pytest

pytest.importorskip("mlx_lm")
pytest.importorskip("PIL")
soundfile = pytest.importorskip("soundfile")

from mlx_lowbit import demo_models  # noqa: E402


@pytest.fixture(scope="module")
def printed():
    """What the demo prints without espeak-ng."""
    import contextlib
    import io

    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr(demo_models.shutil, "which", lambda name: None)
        demo_models.run(seed=1)
    return out.getvalue()


@pytest.mark.parametrize("command", ["generate", "describe", "transcribe"])
def test_every_command_runs(printed, command):
    part = printed.split(f"$ mlx_lowbit.{command} ")[1].split("$ ")[0]
    assert "tokens-per-sec" in part and "Peak memory" in part
    assert ("real-time factor" in part) == (command == "transcribe")


def test_models_are_quantized_as_they_are_meant_to_be(printed):
    glm, moxin, qwen = printed.split("$ mlx_lowbit.convert ")[1:]
    assert re.search(r"model +affine 3-bit", glm)
    assert re.search(r"vision_backbone +bfloat16", moxin) and "affine 8-bit" in moxin
    assert re.search(r"audio_tower +bfloat16", qwen) and "affine 8-bit" in qwen
    assert "a synthesized clip" in qwen


def test_the_clip_is_three_seconds_of_sound():
    samples, rate = soundfile.read(demo_models.CLIP)
    assert rate == 16000 and len(samples) == 3 * rate and 0.3 < abs(samples).max() < 0.6


def test_what_is_missing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(demo_models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(demo_models, "write_checkpoint", lambda *_: None)
    monkeypatch.setattr(demo_models, "_command", lambda *_: None)
    demo_models.run()
    said = capsys.readouterr().out
    assert "mlx-lowbit[vlm]" in said and "mlx-lowbit[audio]" in said


def test_a_command_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(demo_models.importlib, "import_module", lambda name: Failing)
    with pytest.raises(RuntimeError, match="generate ended with status 1"):
        demo_models._command("generate", "--model", "x y")


class Failing:
    @staticmethod
    def main(arguments):
        return 1
