"""``mlx_lowbit.transcribe``: what is said in a recording, from a speech recognition model."""

from __future__ import annotations

import argparse
import json
import os
import time
import uuid
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from . import cli
from .generate import check_options, stream_generate

if TYPE_CHECKING:
    import numpy as np

NAME = "mlx_lowbit.transcribe"
# Of clips, unless they are the lines of subtitles.
CLIP_SECONDS, SUBTITLE_SECONDS = 1200.0, 30.0
FORMATS = ("txt", "json", "srt", "vtt")


@dataclass(frozen=True)
class Segment:
    """What is said in a clip: seconds in the recording, the language's name ("" if none), text."""

    start: float
    end: float
    language: str
    text: str


@dataclass
class Transcription:
    """A recording's text.

    Attributes:
        language: names in the order they were heard, with commas between them.
        audio_seconds: of the recording; ``seconds``: that it took.
        responses: mlx-lm's last one of each clip, with its statistics.
        complete: whether the recording was heard to its end; Ctrl-C leaves the last segment
            unfinished.
    """

    language: str
    text: str
    segments: list[Segment]
    audio_seconds: float
    seconds: float
    responses: list[Any] = field(default_factory=list, repr=False)
    complete: bool = True

    @property
    def real_time_factor(self) -> float:
        """Seconds of work for a second of audio."""
        return self.seconds / self.audio_seconds


class Piece(NamedTuple):
    """A part of a transcript as it comes: text to show, and the segment that it ends, if any."""

    text: str
    segment: Segment | None
    response: Any


def stream_transcribe(
    model: nn.Module,
    processor: Any,
    audio: str | os.PathLike[str] | np.ndarray,
    *,
    language: str | None = None,
    context: str = "",
    max_tokens: int = 4096,
    clip_seconds: float = CLIP_SECONDS,
    **more: Any,
) -> Generator[Piece, None, None]:
    """The text of a recording as it comes, and a segment at the end of each clip.

    Ctrl-C ends the clip where it is: its segment comes, then KeyboardInterrupt is raised.

    Args:
        model, processor: as :func:`mlx_lowbit.load` returns them for a speech recognition model.
        audio: a file that soundfile reads (any rate, channels are averaged), or floats [samples]
            at 16 kHz.
        language: its name or code; None or "auto" leaves it to the model.
        context: words that may come up.
        max_tokens: of a clip at most.
        clip_seconds: longer recordings are cut where they are lowest.
        more: further keywords of :func:`mlx_lowbit.stream_generate`.

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file without sound, samples that are no floats [samples], an unknown language,
            or another model.
    """
    if not hasattr(model, "audio_features"):
        kind = getattr(model, "model_type", type(model).__name__)
        raise ValueError(f"a model of type {kind} does not hear")
    from .models.qwen3_asr_audio import checked
    from .models.qwen3_asr_processing import cut, read_audio

    samples = read_audio(audio) if isinstance(audio, (str, os.PathLike)) else checked(audio)
    clips = cut(samples, clip_seconds)
    for clip in tqdm(clips, desc="clips", disable=None if len(clips) > 1 else True):
        inputs = processor(clip.samples, language, context)
        ends, tokens, shown, response = processor.tokenizer.eos_token_ids, [], "", None
        stopped = False
        try:
            heard = model.embed_inputs(mx.array([inputs.tokens]), mx.array(inputs.features))
            for response in stream_generate(
                model,
                processor.tokenizer,
                inputs.tokens,
                max_tokens=max_tokens,
                input_embeddings=heard[0],
                **more,
            ):
                if response.token not in ends:
                    tokens.append(response.token)
                now = processor.parse(tokens, language)
                # Only what later tokens cannot change: no part of a character, no language yet.
                stable = now.text.rstrip("\ufffd") if now.language or language else ""
                if stable.startswith(shown) and len(stable) > len(shown):
                    new, shown = stable[len(shown) :], stable
                    yield Piece(new, None, response)
        except KeyboardInterrupt:
            stopped = True
        if tokens or not stopped:
            said = processor.parse(tokens, language)
            segment = Segment(*clip.seconds, said.language, said.text)
            rest = said.text[len(shown) :] if said.text.startswith(shown) else ""
            yield Piece(rest, segment, response)
        if stopped:
            raise KeyboardInterrupt


def transcribe(
    model: nn.Module, processor: Any, audio: str | os.PathLike[str] | np.ndarray, **keywords: Any
) -> Transcription:
    """The whole of :func:`stream_transcribe`, whose arguments it takes."""
    return collect(stream_transcribe(model, processor, audio, **keywords))


def collect(pieces: Generator[Piece, None, None], show: bool = False) -> Transcription:
    """The transcription that pieces make; what there is of it where Ctrl-C ended them.

    Args:
        show: print the text as it comes.
    """
    from .models.qwen3_asr_processing import Transcript, join

    begin, segments, responses, complete = time.perf_counter(), [], [], True

    def take(piece: Piece) -> None:
        if piece.segment is not None:
            segments.append(piece.segment)
            if piece.response is not None:
                responses.append(piece.response)
        if show:
            print(piece.text, end="", flush=True)

    try:
        for piece in pieces:
            take(piece)
    except KeyboardInterrupt:
        complete = False
        # Between two pieces, the clip's segment is still to come; otherwise this raises again.
        with suppress(KeyboardInterrupt, StopIteration):
            take(pieces.throw(KeyboardInterrupt))
        pieces.close()
    if show:
        print()
    whole = join(Transcript(s.language, s.text) for s in segments)
    audio, took = segments[-1].end if segments else 0.0, time.perf_counter() - begin
    return Transcription(whole.language, whole.text, segments, audio, took, responses, complete)


def clock(seconds: float, comma: str) -> str:
    """hh:mm:ss and milliseconds after `comma`."""
    whole = round(seconds * 1000)
    hours, rest = divmod(whole, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{comma}{rest % 1000:03}"


def formatted(found: Transcription, output_format: str) -> str:
    """A transcription as txt, json, srt or vtt.

    Raises:
        ValueError: another format.
    """
    if output_format == "txt":
        return found.text + "\n"
    if output_format == "json":
        document = {
            "language": found.language,
            "text": found.text,
            "segments": [asdict(segment) for segment in found.segments],
            "audio_seconds": found.audio_seconds,
        }
        return json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    if output_format not in FORMATS:
        raise ValueError(f"output_format: expected {', '.join(FORMATS)}, got {output_format!r}")
    comma = "," if output_format == "srt" else "."
    lines = [] if output_format == "srt" else ["WEBVTT", ""]
    # A line that is empty would end a subtitle; what has no text is none.
    shown = [(s, " ".join(s.text.split())) for s in found.segments if s.text.strip()]
    for number, (segment, text) in enumerate(shown, 1):
        lines += [str(number)] if output_format == "srt" else []
        lines.append(f"{clock(segment.start, comma)} --> {clock(segment.end, comma)}")
        lines += [text.replace("-->", "->"), ""]
    return "".join(f"{line}\n" for line in lines).removesuffix("\n")


def check_target(path: Path, audio: str) -> None:
    """Refuses an output file that cannot be written, or that is the recording.

    Raises:
        OSError, ValueError: naming it.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f"{path}: expected a file in a directory that exists")
    if path.exists() and os.path.exists(audio) and path.samefile(audio):
        raise ValueError(f"{path}: expected another file than the recording itself")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(f"{path}: cannot be written")


def write(content: str, path: Path) -> None:
    """The file at `path`, whole or not at all; a device or a pipe is written to."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(content, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog=NAME, description="Writes down what a recording says.")
    parser.add_argument("audio", help="a file that soundfile reads: wav, flac, ogg, mp3")
    cli.add_model_options(parser)
    parser.add_argument("--language", help="its name or code; default: the model hears it")
    parser.add_argument("--context", default="", help="words that may come up")
    parser.add_argument("--max-tokens", "-m", type=int, default=4096, help="of a clip")
    parser.add_argument("--clip-seconds", type=float, help="longer recordings are cut")
    parser.add_argument("--output-format", choices=FORMATS, default="txt")
    parser.add_argument("--output-path", "-o", type=Path, help="a file instead of the terminal")
    parser.add_argument("--stream", action="store_true", help="print the text as it comes")
    return parser


def _command(options: argparse.Namespace) -> int:
    from .load import load
    from .models.qwen3_asr_processing import read_audio

    clip_seconds, target = options.clip_seconds, options.output_path
    if clip_seconds is None:
        subtitles = options.output_format in ("srt", "vtt")
        clip_seconds = SUBTITLE_SECONDS if subtitles else CLIP_SECONDS
    check_options(max_tokens=options.max_tokens)
    if not clip_seconds >= 1:
        raise ValueError(f"clip_seconds: expected at least 1, got {clip_seconds:g}")
    if target is not None:
        check_target(target, options.audio)
    samples = read_audio(options.audio)
    model, processor = load(options.model, **cli.load_options(options))
    pieces = stream_transcribe(
        model,
        processor,
        samples,
        language=options.language,
        context=options.context,
        max_tokens=options.max_tokens,
        clip_seconds=clip_seconds,
    )
    found = collect(pieces, show=options.stream)
    if not found.segments:
        return 130  # Ctrl-C before the first word
    if target is not None:
        write(formatted(found, options.output_format), target)
    elif not options.stream or options.output_format != "txt":
        print(formatted(found, options.output_format), end="")
    print("=" * 10)
    print(f"Language: {found.language or 'none'}")
    if found.responses:
        print(cli.statistics(*found.responses))
    print(
        f"Audio: {found.audio_seconds:.2f} s in {found.seconds:.2f} s, "
        f"real-time factor {found.real_time_factor:.3f}"
    )
    return 0 if found.complete else 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return cli.run(NAME, _command, setup_arg_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
