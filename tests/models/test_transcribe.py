"""mlx_lowbit.transcribe from files to text: the model, the command, its formats and its refusals."""

from __future__ import annotations

import importlib
import json

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm")
pytest.importorskip("torch")
pytest.importorskip("transformers")
soundfile = pytest.importorskip("soundfile")

import qwen3_asr_values as values  # noqa: E402
from mlx_lowbit import load  # noqa: E402

command = importlib.import_module("mlx_lowbit.transcribe")
TOKENS = 12


@pytest.fixture(scope="module")
def theirs():
    return values.transformers_model()


@pytest.fixture(scope="module")
def directory(theirs, tmp_path_factory):
    """A checkpoint in the original layout, in float32."""
    found = tmp_path_factory.mktemp("asr")
    (found / "config.json").write_text(json.dumps(values.nested(dtype="float32")))
    mx.save_safetensors(str(found / "model.safetensors"), values.weights(theirs, "original"))
    values.write_tokenizer(found)
    return found


@pytest.fixture(scope="module")
def loaded(directory):
    return load(directory)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A wav of two channels at 16 kHz, and what a model hears of it."""
    file, samples = tmp_path_factory.mktemp("wav") / "clip.wav", values.clip(3.2)
    soundfile.write(file, np.stack([samples, samples], 1), 16000, subtype="FLOAT")
    return file, samples


def said(theirs, processor, samples, language, count=TOKENS):
    """What transformers' model says, as a transcript."""
    inputs = processor(samples, language)
    tokens = values.greedy(theirs, np.array([inputs.tokens]), samples, count)
    ends = [i for i, t in enumerate(tokens) if t in processor.tokenizer.eos_token_ids]
    return processor.parse(tokens[: ends[0]] if ends else tokens, language)


@pytest.mark.parametrize("language", [None, "German"])
def test_text_is_what_transformers_says(theirs, loaded, recording, language):
    model, processor = loaded
    file, samples = recording
    found = command.transcribe(model, processor, file, language=language, max_tokens=TOKENS)
    want = said(theirs, processor, samples, language)
    assert (found.language, found.text) == (want.language, want.text)
    assert found.audio_seconds == pytest.approx(3.2)
    again = command.transcribe(model, processor, samples, language=language, max_tokens=TOKENS)
    assert again.text == found.text


def test_pieces_are_the_text(loaded, recording):
    model, processor = loaded
    pieces = list(
        command.stream_transcribe(model, processor, recording[0], language="en", max_tokens=TOKENS)
    )
    assert pieces[-1].segment is not None and all(p.segment is None for p in pieces[:-1])
    assert "".join(p.text for p in pieces) == pieces[-1].segment.text


def test_long_recordings_are_cut(loaded):
    model, processor = loaded
    samples = values.clip(7.0)
    found = command.transcribe(
        model, processor, samples, language="en", max_tokens=4, clip_seconds=2.0
    )
    assert len(found.segments) >= 3 and found.segments[0].start == 0.0
    for one, after in zip(found.segments, found.segments[1:], strict=False):
        assert one.end == after.start
    assert found.segments[-1].end == pytest.approx(7.0)
    assert found.text == "".join(s.text for s in found.segments)


FOUND = command.Transcription(
    "English",
    "one two",
    [
        command.Segment(0.0, 61.5, "English", "one"),
        command.Segment(61.5, 3723.0456, "English", " two"),
    ],
    3723.0456,
    10.0,
)


def test_formats():
    assert command.formatted(FOUND, "txt") == "one two\n"
    assert command.formatted(FOUND, "srt") == (
        "1\n00:00:00,000 --> 00:01:01,500\none\n\n2\n00:01:01,500 --> 01:02:03,046\n two\n"
    )
    assert command.formatted(FOUND, "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:01:01.500\none\n\n00:01:01.500 --> 01:02:03.046\n two\n"
    )
    document = json.loads(command.formatted(FOUND, "json"))
    assert document["language"] == "English" and document["segments"][1]["start"] == 61.5
    with pytest.raises(ValueError, match="docx"):
        command.formatted(FOUND, "docx")


@pytest.mark.parametrize("output_format", command.FORMATS)
def test_the_command_writes_a_file(directory, recording, tmp_path, capsys, output_format):
    out = tmp_path / "said"
    arguments = [str(recording[0]), "--model", str(directory), "-m", "4", "--language", "English"]
    assert command.main([*arguments, "--output-format", output_format, "-o", str(out)]) == 0
    assert out.read_text() and [p.name for p in tmp_path.iterdir()] == ["said"]
    text = capsys.readouterr().out
    assert "Language: English" in text and "real-time factor" in text and "tokens-per-sec" in text


def test_the_command_streams(directory, recording, capsys):
    arguments = [str(recording[0]), "--model", str(directory), "-m", "4", "--language", "en"]
    assert command.main([*arguments, "--stream", "--q-bits", "8"]) == 0
    assert "Peak memory" in capsys.readouterr().out


def bad_files(folder):
    (folder / "text.wav").write_text("not sound at all")
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "silent.wav", np.zeros(0), 16000)
    return ["text.wav", "empty.wav", "silent.wav", "missing.wav"]


def test_bad_files_are_one_line_and_status_1(directory, tmp_path, capsys):
    for name in bad_files(tmp_path):
        out = tmp_path / "out.txt"
        arguments = [str(tmp_path / name), "--model", str(directory), "-o", str(out)]
        assert command.main(arguments) == 1, name
        printed, error = capsys.readouterr()
        assert printed == "" and error.count("\n") == 1 and name in error
        assert not out.exists()


def test_unknown_languages_are_refused(directory, recording, capsys):
    arguments = [str(recording[0]), "--model", str(directory), "--language", "Klingon"]
    assert command.main(arguments) == 1
    assert "Klingon" in capsys.readouterr().err


def test_ctrl_c_keeps_what_there_is():
    def interrupted():
        yield command.Piece("one", FOUND.segments[0], None)
        raise KeyboardInterrupt

    found = command.collect(interrupted())
    assert found.text == "one" and found.audio_seconds == 61.5


def test_models_that_do_not_hear_are_refused():
    import mlx.nn as nn

    with pytest.raises(ValueError, match="does not hear"):
        command.transcribe(nn.Linear(2, 2), None, np.zeros(10, np.float32))
