"""mlx_lowbit.transcribe from files to text: the model, the command, its formats and its refusals."""

from __future__ import annotations

import importlib
import json
import os
import re
import signal
import types

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm")
pytest.importorskip("torch")
pytest.importorskip("transformers")
soundfile = pytest.importorskip("soundfile")

import qwen3_asr_values as values  # noqa: E402
from mlx_lowbit import cli, load  # noqa: E402

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
    assert len(found.responses) == len(found.segments)


def test_statistics_are_of_all_clips():
    def response(prompt, prompt_tps, tokens, tps, peak):
        return types.SimpleNamespace(
            prompt_tokens=prompt, prompt_tps=prompt_tps, generation_tokens=tokens,
            generation_tps=tps, peak_memory=peak,
        )  # fmt: skip

    one, other = response(100, 50.0, 10, 5.0, 2.0), response(300, 75.0, 20, 10.0, 1.0)
    assert cli.statistics(one) == (
        "Prompt: 100 tokens, 50.000 tokens-per-sec\n"
        "Generation: 10 tokens, 5.000 tokens-per-sec\nPeak memory: 2.000 GB"
    )
    assert cli.statistics(one, other) == (
        "Prompt: 400 tokens, 66.667 tokens-per-sec\n"
        "Generation: 30 tokens, 7.500 tokens-per-sec\nPeak memory: 2.000 GB"
    )


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
        "1\n00:00:00,000 --> 00:01:01,500\none\n\n2\n00:01:01,500 --> 01:02:03,046\ntwo\n"
    )
    assert command.formatted(FOUND, "vtt") == (
        "WEBVTT\n\n00:00:00.000 --> 00:01:01.500\none\n\n00:01:01.500 --> 01:02:03.046\ntwo\n"
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


@pytest.fixture
def interrupted(monkeypatch):
    """Ctrl-C in the second of two clips, while a token is computed or between two pieces."""

    def at(where):
        own, clips = command.stream_generate, []

        def stop_at_the_third(*arguments, **more):
            clips.append(0)
            for index, response in enumerate(own(*arguments, **more)):
                if len(clips) == 2 and index == 3 and where == "in a token":
                    signal.raise_signal(signal.SIGINT)
                yield response

        monkeypatch.setattr(command, "stream_generate", stop_at_the_third)
        if where == "between pieces":
            # Once, when text of the second clip is to be printed.
            def show(text="", **_):
                if len(clips) == 2 and text:
                    clips.append(0)
                    signal.raise_signal(signal.SIGINT)

            monkeypatch.setattr(command, "print", show, raising=False)

    return at


@pytest.mark.parametrize("where", ["in a token", "between pieces"])
def test_ctrl_c_keeps_what_was_said_so_far(loaded, interrupted, where):
    model, processor = loaded
    options = {"language": "en", "max_tokens": TOKENS, "clip_seconds": 2.0}
    whole = command.transcribe(model, processor, values.clip(7.0), **options)
    assert whole.complete and len(whole.segments[1].text) > 3
    interrupted(where)
    pieces = command.stream_transcribe(model, processor, values.clip(7.0), **options)
    found = command.collect(pieces, show=True)
    assert not found.complete and found.segments[0] == whole.segments[0]
    assert len(found.segments) == 2 and found.segments[1].text
    assert whole.segments[1].text.startswith(found.segments[1].text.rstrip("\ufffd"))
    assert len(found.responses) == 2 and found.audio_seconds == whole.segments[1].end


def test_the_command_writes_what_was_said_before_ctrl_c(
    directory, tmp_path, interrupted, monkeypatch, capsys
):
    soundfile.write(tmp_path / "long.wav", values.clip(7.0), 16000)
    arguments = [str(tmp_path / "long.wav"), "--model", str(directory), "--clip-seconds", "2"]
    arguments += ["--language", "en", "-o", str(tmp_path / "out.json"), "--output-format", "json"]
    interrupted("in a token")
    assert command.main([*arguments, "-m", str(TOKENS)]) == 130
    assert len(json.loads((tmp_path / "out.json").read_text())["segments"]) == 2
    out, err = capsys.readouterr()
    assert "real-time factor" in out and "Traceback" not in err

    def at_once(*arguments, **more):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(command, "stream_generate", at_once)
    (tmp_path / "out.json").unlink()
    assert command.main(arguments) == 130
    assert not (tmp_path / "out.json").exists() and capsys.readouterr().out == ""


def test_subtitles_have_text_in_one_line():
    said = ["one\n\ntwo", " ", "a --> b"]
    segments = [command.Segment(i, i + 1.0, "English", text) for i, text in enumerate(said)]
    found = command.Transcription("English", "".join(said), segments, 3.0, 1.0)
    assert command.formatted(found, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,000\none two\n\n2\n00:00:02,000 --> 00:00:03,000\na -> b\n"
    )
    nothing = command.Transcription("", "", segments[1:2], 1.0, 1.0)
    assert command.formatted(nothing, "srt") == ""
    assert command.formatted(nothing, "vtt") == "WEBVTT\n"


@pytest.mark.parametrize("seconds", values.SECONDS)
def test_times_only_go_on(directory, tmp_path, seconds, capsys):
    soundfile.write(tmp_path / "clip.wav", values.clip(seconds), 16000)
    arguments = [str(tmp_path / "clip.wav"), "--model", str(directory), "-m", "2", "--language"]
    arguments += ["German", "--stream", "-o", str(tmp_path / "out")]
    for output_format in ("vtt", "json"):
        assert command.main([*arguments, "--output-format", output_format]) == 0
        text = (tmp_path / "out").read_text()
        if output_format == "vtt":
            times = re.findall(r"(\d\d):(\d\d):(\d\d\.\d{3})", text)
            found = [int(h) * 3600 + int(m) * 60 + float(s) for h, m, s in times]
            assert found and found == sorted(found) and found[-1] <= seconds + 0.001
        else:
            document = json.loads(text)
            assert document["audio_seconds"] == pytest.approx(seconds, abs=1e-4)
            assert {s["language"] for s in document["segments"]} == {"German"}
    capsys.readouterr()


# --- the file that is written -------------------------------------------------------------------


def test_the_recording_is_not_written_over(directory, recording, tmp_path, capsys):
    clip = tmp_path / "clip.wav"
    clip.write_bytes(recording[0].read_bytes())
    (tmp_path / "link").symlink_to(clip)
    for target in (clip, tmp_path / "link"):
        arguments = [str(clip), "--model", str(directory), "-m", "1", "-o", str(target)]
        assert command.main(arguments) == 1
        assert "another file than the recording" in capsys.readouterr().err
    assert clip.read_bytes() == recording[0].read_bytes()


def test_a_file_is_whole_and_as_others_are(tmp_path, monkeypatch):
    mask = os.umask(0o022)
    try:
        command.write("text", tmp_path / "out")
    finally:
        os.umask(mask)
    assert (tmp_path / "out").read_text() == "text"
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o644
    (tmp_path / "link").symlink_to(tmp_path / "out")
    command.write("new", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "out").read_text() == "new"

    def fail(*arguments):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        command.write("other", tmp_path / "out")
    assert (tmp_path / "out").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "out"]


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    command.write("text", tmp_path / "pipe")
    assert os.read(reader, 10) == b"text" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


def test_places_and_recordings_are_refused_before_the_model_is_loaded(tmp_path, capsys):
    (tmp_path / "text.wav").write_text("no sound")
    for arguments in (
        ["-o", str(tmp_path / "no" / "x")],
        ["-m", "0"],
        ["--clip-seconds", "nan"],
        [],
    ):
        assert command.main([str(tmp_path / "text.wav"), "--model", "no/where/", *arguments]) == 1
        assert "where" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong", [None, b"clip.wav", 0.5, np.zeros((2, 9)), [[0.1], [0.2]], [], [1]]
)
def test_samples_of_another_kind_are_refused(loaded, wrong):
    with pytest.raises(ValueError, match=r"^samples: expected "):
        command.transcribe(*loaded, wrong, clip_seconds=1.0)


def test_samples_may_be_a_list(loaded):
    samples = values.clip(1.0)
    whole = command.transcribe(*loaded, samples, language="en", max_tokens=4)
    listed = command.transcribe(*loaded, samples.tolist(), language="en", max_tokens=4)
    assert listed.text == whole.text and listed.audio_seconds == 1.0


def test_models_that_do_not_hear_are_refused():
    import mlx.nn as nn

    with pytest.raises(ValueError, match="does not hear"):
        command.transcribe(nn.Linear(2, 2), None, np.zeros(10, np.float32))
