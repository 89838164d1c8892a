"""Around Qwen3-ASR: sound files to clips, clips to prompts, tokens to a language and a text.

soundfile and soxr are imported where a file is read.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .qwen3_asr_audio import SAMPLE_RATE, log_mel, output_length

if TYPE_CHECKING:
    from .qwen3_asr import ModelArgs

MAX_SECONDS = 1200.0  # of a clip; the model was trained for no more
_SEARCH_SECONDS = 5.0  # to either side of where a clip should end
_QUIET_SECONDS = 0.1  # of the stretch that is looked for there
_BLOCK = 1 << 20  # frames of a file at a time
_LEAST_RATE = 1000  # resampling would make a very long recording of a small file below

_TEXT_MARK = "<asr_text>"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
# A character more often than this in a row, and a pattern as often, is the model repeating itself.
_REPEATS = 20
_CHARACTERS = re.compile(rf"(.)\1{{{_REPEATS},}}", re.DOTALL)
_PATTERNS = re.compile(rf"(.{{1,20}}?)\1{{{_REPEATS - 1},}}", re.DOTALL)


# --- sound files --------------------------------------------------------------------------------


def read_audio(path: str | os.PathLike[str]) -> np.ndarray:
    """A file that libsndfile reads (wav, flac, ogg, mp3, ...), of any rate and channels.

    Returns:
        float32 [samples] at 16 kHz, the mean of the channels.

    Raises:
        FileNotFoundError: no such file.
        ImportError: soundfile or soxr is not installed.
        OSError: a file that cannot be read.
        ValueError: no sound file, an empty one, or one with samples that are not finite.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a sound file, got a directory")
    try:
        import soundfile
    except ImportError:
        raise ImportError("sound files need soundfile: pip install 'mlx-lowbit[audio]'") from None
    with path.open("rb") as stream:
        try:
            with soundfile.SoundFile(stream) as file:
                rate = file.samplerate
                blocks = file.blocks(_BLOCK, dtype="float32", always_2d=True)
                parts = [block.mean(axis=1) for block in blocks]
        except (soundfile.SoundFileError, RuntimeError) as error:
            size = path.stat().st_size
            reason = str(error).removeprefix(f"Error opening {stream!r}: ").strip()
            reason = "it is empty" if size == 0 else reason
            raise ValueError(f"{path}: not a sound file that can be read: {reason}") from None
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    if not np.isfinite(samples).all():
        first = int(np.flatnonzero(~np.isfinite(samples))[0])
        raise ValueError(f"{path}: sample {first} is {samples[first]}")
    if samples.size == 0:
        raise ValueError(f"{path}: it holds no sound")
    if rate < _LEAST_RATE:
        raise ValueError(f"{path}: expected a rate of at least {_LEAST_RATE} Hz, got {rate}")
    found = resample(samples, rate)
    return found if found.size else samples[:1]


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """samples [n] at `rate` -> float32 [about n * 16000 / rate] at 16 kHz.

    Raises:
        ImportError: soxr is not installed, and the rate is another one.
        ValueError: a rate that is not positive.
    """
    if rate <= 0:
        raise ValueError(f"rate: expected a positive number of samples a second, got {rate!r}")
    samples = np.ascontiguousarray(samples, np.float32)
    if rate == SAMPLE_RATE or samples.size == 0:
        return samples
    try:
        import soxr
    except ImportError:
        raise ImportError("other rates need soxr: pip install 'mlx-lowbit[audio]'") from None
    return soxr.resample(samples, rate, SAMPLE_RATE)


class Clip(NamedTuple):
    """A part of a recording: its first sample, and its samples."""

    start: int
    samples: np.ndarray

    @property
    def seconds(self) -> tuple[float, float]:
        """Where it begins and ends in the recording."""
        return self.start / SAMPLE_RATE, (self.start + self.samples.size) / SAMPLE_RATE


def cut(samples: np.ndarray, max_seconds: float = MAX_SECONDS) -> list[Clip]:
    """A recording in clips that are, one after the other, exactly it.

    Each is about `max_seconds` long: it ends where the recording is lowest (by the mean of |x| over
    0.1 s) up to 5 s, or a quarter of `max_seconds`, before or after.

    Args:
        samples: floats [n] at 16 kHz.

    Raises:
        ValueError: max_seconds below 1.
    """
    if not max_seconds >= 1:
        raise ValueError(f"max_seconds: expected at least 1, got {max_seconds!r}")
    limit = math.ceil(min(max_seconds * SAMPLE_RATE, max(samples.size, 1)))
    reach = min(int(_SEARCH_SECONDS * SAMPLE_RATE), limit // 4)
    clips, start = [], 0
    while samples.size - start > limit:
        end = _lowest(samples, start + limit - reach, start + limit + reach)
        clips.append(Clip(start, samples[start:end]))
        start = end
    clips.append(Clip(start, samples[start:]))
    return clips


def _lowest(samples: np.ndarray, begin: int, end: int) -> int:
    """The quietest sample of the quietest 0.1 s in [begin, end)."""
    loud = np.abs(samples[begin:end]).astype(np.float64)
    width = min(int(_QUIET_SECONDS * SAMPLE_RATE), loud.size)
    sums = np.concatenate([[0.0], np.cumsum(loud)])
    first = int(np.argmin(sums[width:] - sums[:-width]))
    return begin + first + int(np.argmin(loud[first : first + width]))


# --- languages and what the model says -----------------------------------------------------------


def language_name(language: str | None, supported: Sequence[str]) -> str | None:
    """The model's name of a language, which may be given by its code; None for None and "auto".

    Raises:
        ValueError: a language that is not among those `supported`.
    """
    from .qwen3_asr import LANGUAGES

    wanted = None if language is None else language.strip().lower()
    if wanted in (None, "auto"):
        return None
    for name in supported:
        if wanted in (name.lower(), LANGUAGES.get(name)):
            return name
    names = ", ".join(supported)
    raise ValueError(f"Unsupported language: {language}. Supported: {names}")


class Transcript(NamedTuple):
    """What was said: the language's name ("" where none was heard or told), and the text."""

    language: str
    text: str


def parse_output(output: str, language: str | None = None) -> Transcript:
    """What the model said, ``language English<asr_text>...``, in its parts.

    Endless repetitions are cut to one. Without the mark everything is text.

    Args:
        language: the language that the prompt forced: the output then is the text alone.
    """
    output = collapse(output.strip())
    if language is not None:
        return Transcript(language, output)
    before, mark, text = output.partition(_TEXT_MARK)
    if not mark:
        return Transcript("", output)
    first = next((line.strip() for line in before.splitlines() if line.strip()), "")
    label, _, name = first.partition(" ")
    name = name.strip() if label.lower() == "language" else first
    return Transcript("" if name.lower() == "none" else name.capitalize(), text.strip())


def collapse(text: str) -> str:
    """`text` without endless repetitions.

    A character more than 20 times in a row is left once. So is what has up to 20 characters and
    comes 20 times or more in a row, unless fewer than 40 characters are left where it begins.
    """
    text = _CHARACTERS.sub(r"\1", text)
    parts, begin = [], 0
    while (found := _PATTERNS.search(text, begin)) and len(text) - found.start() >= 2 * _REPEATS:
        parts += [text[begin : found.start()], found[1]]
        begin = found.end()
    return "".join([*parts, text[begin:]])


def join(transcripts: Iterable[Transcript]) -> Transcript:
    """The transcripts of clips in their order as one: texts as they are, languages in turn."""
    languages, texts = [], []
    for language, text in transcripts:
        texts.append(text)
        if language and languages[-1:] != [language]:
            languages.append(language)
    return Transcript(",".join(languages), "".join(texts))


# --- prompts ------------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """What a clip is for the model: ``Model.embed_inputs(mx.array([tokens]), mx.array(features))``.

    Attributes:
        tokens: ids of the prompt.
        features: float32 [num_mel_bins, frames].
    """

    tokens: list[int]
    features: np.ndarray


class Processor:
    """Makes a model's inputs from a clip, and a transcript from its output.

    Args:
        args: the model's configuration.
        tokenizer: with ``encode``, ``decode`` and ``convert_tokens_to_ids``, as transformers' and
            mlx-lm's; kept as ``tokenizer``.

    Raises:
        ValueError: the tokenizer of another model.
    """

    def __init__(self, args: ModelArgs, tokenizer: Any) -> None:
        self.args, self.tokenizer = args, tokenizer
        self._ids = {name: self._id(name) for name in _MARKS}
        if (own := self._ids["<|audio_pad|>"]) != args.audio_token_id:
            raise ValueError(
                f"the tokenizer is another model's: '<|audio_pad|>' is {own}, and the model's "
                f"audio_token_id {args.audio_token_id}"
            )

    @classmethod
    def from_directory(
        cls, directory: str | Path, args: ModelArgs, config: dict[str, Any] | None = None
    ) -> Processor:
        """With the tokenizer in `directory`: ``tokenizer.json``, or ``vocab.json`` and
        ``merges.txt``.

        Args:
            config: ``config.json``, whose end tokens are added to the two of Qwen's tokenizer.

        Raises:
            FileNotFoundError: no tokenizer is there.
            ValueError: one that cannot be read, or that of another model.
        """
        directory = Path(directory)
        if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
            raise FileNotFoundError(f"{directory}: no tokenizer ({', '.join(_TOKENIZER_FILES)})")
        from mlx_lm.tokenizer_utils import load

        from ..load import end_tokens

        try:
            tokenizer = load(directory, {"local_files_only": True})
        # What the readers of tokenizer files raise is not limited to one class.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{directory}: the tokenizer cannot be read: {reason}") from error
        try:
            self = cls(args, tokenizer)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None
        ends = [tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>")]
        ends += end_tokens(directory, config or {}) or []
        tokenizer.eos_token_ids.update(token for token in ends if isinstance(token, int))
        return self

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer's files."""
        self.tokenizer.save_pretrained(str(directory))

    def __call__(
        self, samples: np.ndarray, language: str | None = None, context: str = ""
    ) -> Inputs:
        """The model's inputs for a clip, floats [samples] at 16 kHz.

        Args:
            language, context: as in :meth:`prompt`.

        Raises:
            ValueError: as :meth:`prompt` and :func:`log_mel`, or a clip and a context that the
                model has not positions enough for.
        """
        audio = self.args.audio_config
        features = log_mel(samples, audio.num_mel_bins)
        tokens = self.prompt(output_length(features.shape[1], audio.chunk), language, context)
        if len(tokens) > (limit := self.args.max_position_embeddings):
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, and this model has positions for {limit}"
            )
        return Inputs(tokens, features)

    def prompt(
        self, audio_tokens: int, language: str | None = None, context: str = ""
    ) -> list[int]:
        """The ids of a prompt with places for so many tokens of audio.

        Args:
            language: its name or code; then the output is the text alone. None or "auto": the
                output begins with the language.
            context: words that may come up, or other help for the model.

        Raises:
            ValueError: an unknown language, or a context with a special token in it.
        """
        name, mark = language_name(language, self.args.support_languages), self._ids
        start, end, newline = mark["<|im_start|>"], mark["<|im_end|>"], self._text("\n")
        system = self._text(f"system\n{context}")
        if any(token in mark.values() for token in system):
            raise ValueError(f"context: expected plain text, got a special token in {context!r}")
        tokens = [start, *system, end, *newline, start, *self._text("user\n")]
        tokens += [mark["<|audio_start|>"], *[mark["<|audio_pad|>"]] * audio_tokens]
        tokens += [mark["<|audio_end|>"], end, *newline, start, *self._text("assistant\n")]
        if name is not None:
            tokens += [*self._text(f"language {name}"), mark[_TEXT_MARK]]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of generated ids, with the mark of the text where it is a special token too."""
        tokens = [int(token) for token in tokens]
        mark = self._ids[_TEXT_MARK]
        if mark not in tokens:
            return self.tokenizer.decode(tokens, skip_special_tokens=True)
        parts = tokens[: tokens.index(mark)], tokens[tokens.index(mark) + 1 :]
        return _TEXT_MARK.join(self.tokenizer.decode(p, skip_special_tokens=True) for p in parts)

    def parse(self, tokens: Sequence[int], language: str | None = None) -> Transcript:
        """The transcript that generated ids stand for; :func:`parse_output` of their text.

        Args:
            language: as it was given to :meth:`prompt`.

        Raises:
            ValueError: an unknown language.
        """
        name = language_name(language, self.args.support_languages)
        return parse_output(self.decode(tokens), name)

    def _text(self, text: str) -> list[int]:
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]

    def _id(self, name: str) -> int:
        found = self.tokenizer.convert_tokens_to_ids(name)
        # What is unknown becomes None, or the id of an unknown token.
        if not isinstance(found, int) or self.tokenizer.convert_ids_to_tokens(found) != name:
            raise ValueError(f"the tokenizer is another model's: it has no token {name!r}")
        if found >= self.args.vocab_size:
            raise ValueError(
                f"the tokenizer is another model's: {name!r} is {found}, and the model has "
                f"{self.args.vocab_size} rows"
            )
        return found


_MARKS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_pad|>",
    _TEXT_MARK,
)
