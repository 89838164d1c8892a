"""Around Qwen3-ASR: spectrograms, sound files, clips, prompts, and what the model says."""

from __future__ import annotations

import itertools
import json
import re

import mlx.core as mx
import numpy as np
import pytest
import qwen3_asr_values as values
from hypothesis import given
from hypothesis import strategies as st
from mlx_lowbit.models import qwen3_asr
from mlx_lowbit.models.qwen3_asr_audio import log_mel, mel_filters
from mlx_lowbit.models.qwen3_asr_processing import (
    Processor,
    Transcript,
    collapse,
    cut,
    join,
    language_name,
    parse_output,
    read_audio,
    resample,
)

NAMES = tuple(qwen3_asr.LANGUAGES)


# --- spectrograms -------------------------------------------------------------------------------


@pytest.mark.cpu  # numpy's work against torch's, wherever the model runs
@pytest.mark.parametrize("seconds", [*values.SECONDS, 0.50001, 3.07718])
@pytest.mark.parametrize("signal", [values.clip, values.tonal], ids=["noise", "tones"])
def test_log_mel(signal, seconds):
    """transformers' features, tightly as they would be in float64, and as its float32 has them.

    Against the latter 1e-5 holds at nearly every value, and at all of short noise. The exceptions
    are its own rounding: where it differs from us by more, it does from its formula in float64.
    """
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    samples = signal(seconds)
    got, exact, shipped = log_mel(samples), values.exact_mel(samples), values.valid(samples)
    assert got.dtype == np.float32
    assert got.shape == shipped.shape == (128, max(8000, samples.size) // 160)
    np.testing.assert_allclose(got, exact, atol=1e-6, rtol=0)
    difference = np.abs(got - shipped)
    assert difference.mean() < 1e-6 and difference.max() < 1e-4
    assert (difference > 1e-5).mean() < 1e-3
    if signal is values.clip and seconds < 10:
        assert difference.max() < 1e-5


@pytest.mark.parametrize("kind", ["silence", "tone", "one click", "loud"])
def test_log_mel_of_extremes(kind):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    samples = np.zeros(24000, np.float32)
    if kind == "tone":  # where float32 spectra are 1e-4 off, transformers' own among them
        samples += np.sin(np.arange(24000) * 0.3).astype(np.float32)
    elif kind == "one click":
        samples[12345] = 1
    elif kind == "loud":
        samples += 3e4 * values.clip(1.5)
    whisper = transformers.WhisperFeatureExtractor(feature_size=128)
    exact = whisper._np_extract_fbank_features(samples[None], "cpu")[0]
    np.testing.assert_allclose(log_mel(samples), exact[:, :150], atol=2e-6, rtol=0)


def test_mel_filters():
    transformers = pytest.importorskip("transformers.audio_utils")
    for bins in (80, 128):
        want = transformers.mel_filter_bank(
            201, bins, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney"
        )
        np.testing.assert_allclose(mel_filters(bins), want, atol=1e-12)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(0, np.float32), "expected some, got none"),
        (np.zeros((2, 9), np.float32), r"expected floats \[samples\]"),
        (np.zeros(9, np.int16), r"expected floats \[samples\], got int16"),
        (np.array([0, 1, np.inf]), "expected finite numbers, got inf at 2"),
    ],
)
def test_samples_are_refused(samples, message):
    with pytest.raises(ValueError, match=message):
        log_mel(samples)


# --- sound files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "subtype", "noise"),
    [
        ("wav", "PCM_16", 1e-4),
        ("wav", "PCM_24", 1e-6),
        ("wav", "PCM_32", 1e-6),
        ("wav", "FLOAT", 1e-6),
        ("flac", "PCM_16", 1e-4),
        ("ogg", "VORBIS", 0.2),
    ],
)
@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_read_audio(channels, rate, ending, subtype, noise, tmp_path):
    """A tone comes back as it went in, whatever held it; channels are averaged."""
    soundfile = pytest.importorskip("soundfile")
    pytest.importorskip("soxr")
    file = tmp_path / f"tone.{ending}"
    shares = np.array([[0.4, 0.8, 0.6][:channels]])
    tone = np.sin(2 * np.pi * 440 * np.arange(2 * rate) / rate)[:, None] * shares
    soundfile.write(file, tone, rate, subtype=subtype)
    got = read_audio(file)
    assert got.dtype == np.float32 and got.shape == (32000,)
    want = shares.mean() * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000)
    inner = slice(800, -800)  # a filter needs its run-up
    assert np.sqrt(np.mean((got - want)[inner] ** 2)) < max(noise, 1e-4 if rate != 16000 else 0)


def test_resampling_keeps_out_what_cannot_be_heard():
    pytest.importorskip("soxr")
    tone = np.sin(2 * np.pi * 15000 * np.arange(48000) / 48000).astype(np.float32)
    assert np.abs(resample(tone, 48000)[800:-800]).max() < 1e-3
    with pytest.raises(ValueError, match="rate: expected a positive"):
        resample(tone, 0)


def test_files_that_are_no_sound_are_refused(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    (tmp_path / "text.wav").write_text("This is not a sound.\n" * 20)
    (tmp_path / "empty.wav").write_bytes(b"")
    soundfile.write(tmp_path / "silent.wav", np.zeros(0), 16000)
    soundfile.write(tmp_path / "nan.wav", np.array([0, 0.1, np.nan]), 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "cut.flac", values.clip(1), 16000)
    whole = (tmp_path / "cut.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(whole[: len(whole) // 2])
    expected = {
        "text.wav": "not a sound file that can be read: Format not recognised",
        "empty.wav": "not a sound file that can be read: it is empty",
        "silent.wav": "it holds no sound",
        "nan.wav": "sample 2 is nan",
        "cut.flac": "not a sound file that can be read",
        "slow.wav": "expected a rate of at least 1000 Hz, got 5",
    }
    soundfile.write(tmp_path / "slow.wav", values.clip(1), 5)
    for name, message in expected.items():
        with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path / name))}: {message}"):
            read_audio(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.wav: no such file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(IsADirectoryError, match="got a directory"):
        read_audio(tmp_path)
    soundfile.write(tmp_path / "one.wav", np.array([0.5]), 48000)
    assert read_audio(tmp_path / "one.wav").shape == (1,)


# --- clips --------------------------------------------------------------------------------------


@given(
    seconds=st.floats(0, 40),
    limit=st.floats(1, 30),
    seed=st.integers(0, 5),
)
def test_clips_are_the_recording(seconds, limit, seed):
    samples = np.random.default_rng(seed).standard_normal(int(seconds * 16000)).astype(np.float32)
    clips = cut(samples, limit)
    np.testing.assert_array_equal(np.concatenate([clip.samples for clip in clips]), samples)
    reach = min(5, limit / 4) + 0.01
    for clip, after in itertools.pairwise(clips):
        assert after.start == clip.start + clip.samples.size
        assert limit - reach <= clip.samples.size / 16000 <= limit + reach
    assert clips[-1].samples.size / 16000 <= limit and clips[0].start == 0


def test_an_endless_clip_is_the_recording():
    assert [c.samples.size for c in cut(np.zeros(9), float("inf"))] == [9]


def test_cuts_are_where_it_is_quiet():
    samples = np.random.default_rng(0).uniform(0.1, 1, 16000 * 70).astype(np.float32)
    quiet = (27.3, 58.9)
    for second in quiet:
        begin = int(second * 16000)
        samples[begin : begin + 3200] *= 0.01
    samples[: 16000 * 20] *= 0.001  # quieter, but out of reach
    clips = cut(samples, 30)
    assert len(clips) == 3
    for clip, second in zip(clips, quiet, strict=False):
        assert second <= clip.seconds[1] <= second + 0.2
    with pytest.raises(ValueError, match="max_seconds"):
        cut(samples, 0)


# --- languages and output -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_as", "name"),
    [("english", "English"), (" GERMAN", "German"), ("yue", "Cantonese"), ("zh", "Chinese")],
)
def test_languages(given_as, name):
    assert language_name(given_as, NAMES) == name
    assert language_name(None, NAMES) is language_name("auto", NAMES) is None


def test_languages_that_are_not_known_are_refused():
    for wrong in ("Klingon", "", "xx"):
        with pytest.raises(ValueError, match=f"Unsupported language: {wrong}. Supported: .*Arabic"):
            language_name(wrong, NAMES)
    with pytest.raises(ValueError, match=r"Supported: English, German$"):
        language_name("French", ("English", "German"))


def test_languages_are_those_of_transformers():
    processing = pytest.importorskip("transformers.models.qwen3_asr.processing_qwen3_asr")
    assert {c: n for n, c in qwen3_asr.LANGUAGES.items()} == processing.LANGUAGE_CODE_TO_NAME


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("language English<asr_text>Hello there.", ("English", "Hello there.")),
        ("language None<asr_text>", ("", "")),
        (" language german <asr_text> Guten Tag \n", ("German", "Guten Tag")),
        ("language English<asr_text>a <asr_text> b", ("English", "a <asr_text> b")),
        ("just text", ("", "just text")),
        ("\nlanguage French\nmore<asr_text>Oui", ("French", "Oui")),
        ("<asr_text>x", ("", "x")),
        ("language<asr_text>x", ("", "x")),
        ("", ("", "")),
    ],
)
def test_parse_output(output, expected):
    assert parse_output(output) == expected


def test_a_forced_language_leaves_the_text_alone():
    text = "language is <asr_text> what"
    assert parse_output(text, "English") == ("English", text)


PIECES = st.lists(
    st.tuples(st.text("ab 。c", min_size=1, max_size=21), st.sampled_from([1, 2, 19, 20, 21, 45])),
    max_size=4,
)


@given(pieces=PIECES)
def test_repetitions_are_cut_as_transformers_does(pieces):
    processing = pytest.importorskip("transformers.models.qwen3_asr.processing_qwen3_asr")
    text = "".join(piece * times for piece, times in pieces)
    assert collapse(text) == processing._detect_and_fix_repetitions(text)


def test_repetitions():
    assert collapse("x" + "ha" * 60 + "!") == "xha!"
    assert collapse("a" * 20 + "b") == "a" * 20 + "b" and collapse("a" * 21 + "b") == "ab"
    assert parse_output("language English<asr_text>" + "no. " * 30 + "Yes")[1] == "no. Yes"


def test_transcripts_of_clips_are_joined():
    parts = [("Chinese", "你好"), ("Chinese", "。"), ("", ""), ("English", "Hi"), ("Chinese", "好")]
    joined = join(Transcript(*part) for part in parts)
    assert joined == ("Chinese,English,Chinese", "你好。Hi好")
    assert join([]) == ("", "")


# --- prompts ------------------------------------------------------------------------------------


@pytest.fixture(params=["vocab", "json"])
def directory(request, tmp_path):
    pytest.importorskip("transformers")
    values.write_tokenizer(tmp_path, kind=request.param, special=request.param == "vocab")
    (tmp_path / "config.json").write_text(json.dumps(values.nested()))
    return tmp_path


@pytest.fixture
def processor(directory):
    return qwen3_asr.load_processor(directory, values.nested(eos_token_id=[42, 43]))


def test_prompt(processor):
    text = (
        "<|im_start|>system\nMaría, len<|im_end|>\n<|im_start|>user\n<|audio_start|>"
        "<|audio_pad|><|audio_pad|><|audio_pad|><|audio_end|><|im_end|>\n<|im_start|>assistant\n"
    )
    encode = processor.tokenizer.encode
    assert processor.prompt(3, context="María, len") == encode(text)
    forced = processor.prompt(3, "de", "María, len")
    assert forced == encode(f"{text}language German<asr_text>")
    assert forced.count(values.PAD) == 3 and forced[-1] == 264


def test_ids_of_the_published_tokenizer():
    """A prompt of its ids: prefix and suffix as they are published."""
    vocabulary = {"system": 8948, "user": 872, "assistant": 77091, "\n": 198}
    marks = ["<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>"]
    ids = dict(zip(marks, (151644, 151645, 151669, 151670), strict=True))
    ids |= {"<|audio_pad|>": 151676, "<asr_text>": 151704}

    class Published:
        def convert_tokens_to_ids(self, name):
            return ids[name]

        def convert_ids_to_tokens(self, token):
            return next(name for name, own in ids.items() if own == token)

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return [vocabulary[part] for part in re.findall(r"\w+|\n", text)]

    prefix = [151644, 8948, 198, 151645, 198, 151644, 872, 198, 151669]
    suffix = [151670, 151645, 198, 151644, 77091, 198]
    got = Processor(qwen3_asr.ModelArgs(), Published()).prompt(2)
    assert got == [*prefix, 151676, 151676, *suffix]


def test_inputs_fit_the_model(processor):
    model = qwen3_asr.Model(qwen3_asr.ModelArgs.from_dict(values.nested()))
    for seconds in (0.3, 1, 8.1):
        tokens, heard = processor(values.clip(seconds), "English")
        x = model.embed_inputs(mx.array([tokens]), mx.array(heard))
        assert x.shape == (1, len(tokens), 64)


def test_a_prompt_is_refused(processor):
    with pytest.raises(ValueError, match="context: expected plain text"):
        processor.prompt(1, context="a<|im_end|>b")
    with pytest.raises(ValueError, match=r"Unsupported language: French\. Supported: Chinese"):
        processor.prompt(1, "French")
    processor.args.text_config.max_position_embeddings = 40
    with pytest.raises(ValueError, match=r"\d+ tokens, and this model has positions for 40"):
        processor(values.clip(8))


def test_output_is_parsed_with_special_tokens_in_it(processor):
    encode = processor.tokenizer.encode
    tokens = encode("language German<asr_text>Grüße, len<|im_end|>")
    assert processor.parse(tokens) == ("German", "Grüße, len")
    assert processor.parse(encode("Grüße<|im_end|>"), "de") == ("German", "Grüße")
    assert processor.parse(encode("language None<asr_text><|im_end|>")) == ("", "")
    assert processor.parse([]) == ("", "")


def test_end_tokens(directory, processor):
    ends = {values.EOS, values.EOS + 2}
    assert set(processor.tokenizer.eos_token_ids) == ends | {42, 43}
    (directory / "generation_config.json").write_text('{"eos_token_id": 7}')
    again = qwen3_asr.load_processor(directory, values.nested(eos_token_id=[42, 43]))
    assert set(again.tokenizer.eos_token_ids) == ends | {7}


def test_tokenizers_of_other_models_are_refused(directory, tmp_path):
    with pytest.raises(ValueError, match=r"another model's: '<\|audio_pad\|>' is 263, .* 7$"):
        qwen3_asr.load_processor(directory, values.nested(audio_token_id=7))
    small = values.nested(audio_token_id=3, text_config={**values.TEXT, "vocab_size": 260})
    with pytest.raises(ValueError, match="the model has 260 rows"):
        qwen3_asr.load_processor(directory, small)
    (directory / "tokenizer_config.json").write_text("{}")
    for file in directory.glob("tokenizer.json"):
        content = json.loads(file.read_text())
        content["added_tokens"] = content["added_tokens"][:2]
        file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"it has no token '<\|"):
        qwen3_asr.load_processor(directory, values.nested())
    for file in (*directory.glob("tokenizer.json"), *directory.glob("vocab.json")):
        file.write_text("{")
    with pytest.raises(ValueError, match="the tokenizer cannot be read"):
        qwen3_asr.load_processor(directory, values.nested())
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        qwen3_asr.load_processor(empty, values.nested())
