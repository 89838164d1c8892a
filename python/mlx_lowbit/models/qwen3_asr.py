"""Qwen3-ASR 0.6B and 1.7B: model_type ``qwen3_asr``, speech to text in 30 languages.

Three layouts of files are published; parameter names here are those of the MLX ones
(``audio_tower.``, ``model.``), and ``sanitize`` reads the other two: ``thinker.`` before every name,
and transformers' (``model.audio_tower.``, ``model.multi_modal_projector.``,
``model.language_model.``). The forced aligner of the same family is another model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..checkpoint import TensorError
from . import qwen3
from .qwen3_asr_audio import AudioArgs, AudioEncoder, layout, output_length

if TYPE_CHECKING:
    from .qwen3_asr_processing import Processor

LANGUAGES = {
    "Arabic": "ar",
    "Cantonese": "yue",
    "Chinese": "zh",
    "Czech": "cs",
    "Danish": "da",
    "Dutch": "nl",
    "English": "en",
    "Filipino": "fil",
    "Finnish": "fi",
    "French": "fr",
    "German": "de",
    "Greek": "el",
    "Hindi": "hi",
    "Hungarian": "hu",
    "Indonesian": "id",
    "Italian": "it",
    "Japanese": "ja",
    "Korean": "ko",
    "Macedonian": "mk",
    "Malay": "ms",
    "Persian": "fa",
    "Polish": "pl",
    "Portuguese": "pt",
    "Romanian": "ro",
    "Russian": "ru",
    "Spanish": "es",
    "Swedish": "sv",
    "Thai": "th",
    "Turkish": "tr",
    "Vietnamese": "vi",
}
"""The languages it was trained for, with their codes."""

# What the published configurations of both sizes share, and the widths of 1.7B.
_TEXT = {
    "model_type": "qwen3",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 65536,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
_ALIGNER = "qwen3_forced_aligner"


@dataclass
class ModelArgs:
    """``config.json``, nested in ``thinker_config`` or flat.

    Attributes:
        audio_config, text_config: their fields; what is missing has Qwen3-ASR-1.7B's value.
        audio_token_id: the id in a prompt in whose places the encoder's rows go.
        support_languages: names of languages, first letter upper.
    """

    model_type: str = "qwen3_asr"
    audio_config: AudioArgs = field(default_factory=AudioArgs)
    text_config: qwen3.ModelArgs = field(default_factory=lambda: qwen3.ModelArgs(**_TEXT))
    audio_token_id: int = 151676
    support_languages: tuple[str, ...] = tuple(LANGUAGES)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """From ``config.json`` of any published layout.

        Raises:
            ValueError: a value that does not fit, by name, or the configuration of the aligner.
        """
        inner = _object(config, "thinker_config") if config.get("thinker_config") else config
        kinds = [part.get("model_type") for part in (config, inner)]
        names = [*(config.get("architectures") or ()), *(inner.get("architectures") or ())]
        if _ALIGNER in kinds or any("TokenClassification" in str(name) for name in names):
            raise ValueError(
                f"model_type: {_ALIGNER!r} is the forced aligner, whose head is another one; "
                "expected the recognizer, 'qwen3_asr'"
            )
        audio, text = _object(inner, "audio_config"), dict(_object(inner, "text_config"))
        if text.get("tie_word_embeddings") is None:
            text["tie_word_embeddings"] = inner.get("tie_word_embeddings")
        if audio.get("output_dim") is None:
            audio = {**audio, "output_dim": text.get("hidden_size")}
        text = _TEXT | {k: v for k, v in text.items() if v is not None}
        languages = config.get("support_languages") or inner.get("support_languages")
        values = {
            "audio_token_id": inner.get("audio_token_id"),
            "support_languages": languages and tuple(languages),
        }
        return cls(
            audio_config=AudioArgs.from_dict(audio),
            text_config=qwen3.ModelArgs.from_dict(text),
            **{k: v for k, v in values.items() if v is not None},
        )

    def __post_init__(self) -> None:
        if (width := self.audio_config.output_dim) != self.text_config.hidden_size:
            raise ValueError(
                f"output_dim: expected the decoder's {self.text_config.hidden_size}, got {width}"
            )
        token = self.audio_token_id
        if (
            not isinstance(token, int)
            or isinstance(token, bool)
            or not 0 <= token < self.vocab_size
        ):
            raise ValueError(f"audio_token_id: expected 0 to {self.vocab_size - 1}, got {token!r}")
        for name in self.support_languages:
            if not isinstance(name, str) or not name:
                raise ValueError(f"support_languages: expected names, got {name!r}")

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.text_config.vocab_size

    @property
    def max_position_embeddings(self) -> int:
        """Positions for a prompt and what is generated after it."""
        return self.text_config.max_position_embeddings


def _object(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}: expected an object, got {value!r}")
    return value or {}


class Model(nn.Module):
    """Encoder and decoder; generation is mlx-lm's, from :meth:`embed_inputs`."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.audio_tower = AudioEncoder(args.audio_config)
        self.model = qwen3.Decoder(args.text_config)
        if not args.text_config.tie_word_embeddings:
            self.lm_head = nn.Linear(args.text_config.hidden_size, args.vocab_size, bias=False)

    def __call__(
        self,
        inputs: mx.array | None,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits [B, L, vocab_size].

        Args:
            inputs: integers [B, L]; not read where input_embeddings are given.
            cache: one of mlx-lm's caches for each layer.
            input_embeddings: [B, L, hidden], of :meth:`embed_inputs`.
        """
        x = self.model(inputs, cache, input_embeddings)
        return self.lm_head(x) if "lm_head" in self else self.model.as_head(x)

    def audio_features(self, features: mx.array) -> mx.array:
        """features [num_mel_bins, frames] of one clip -> [tokens, hidden].

        tokens is ``output_length(frames)`` of :mod:`mlx_lowbit.models.qwen3_asr_audio`.
        """
        return self.audio_tower(features)

    def embed_inputs(
        self, inputs: mx.array, features: mx.array | Sequence[mx.array] | None = None
    ) -> mx.array:
        """The embeddings of a prompt, with what was heard in the places of audio_token_id.

        Args:
            inputs: integers [B, L].
            features: a log-mel spectrogram [num_mel_bins, frames], or one for each clip in the
                order of the prompts; None for a prompt without audio.

        Returns:
            [B, L, hidden].

        Raises:
            ValueError: more or fewer places than there are tokens of audio.
        """
        x = self.model.embed(inputs)
        places = np.flatnonzero(np.array(inputs).reshape(-1) == self.args.audio_token_id)
        clips = [] if features is None else features
        clips = [clips] if isinstance(clips, mx.array) else list(clips)
        chunk = self.args.audio_config.chunk
        tokens = sum(output_length(clip.shape[-1], chunk) for clip in clips)
        if len(places) != tokens:
            raise ValueError(
                f"inputs: expected {tokens} audio tokens, as the features have, got {len(places)}"
            )
        if not tokens:
            return x
        heard = mx.concatenate([self.audio_features(clip) for clip in clips])
        rows = x.reshape(-1, x.shape[-1])
        rows[mx.array(places)] = heard.astype(x.dtype)
        return rows.reshape(x.shape)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's blocks, one cache each."""
        return self.model.layers

    def quant_predicate(self, path: str, module: nn.Module) -> bool:
        """Whether a module that can be quantized should be: those of the decoder, not the encoder.

        Files with a quantized encoder can be read nevertheless.
        """
        return not path.startswith("audio_tower")

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Tensors of any published layout, under the names of this model.

        Convolutions are transposed where their shape is torch's; a copy of a tied head is dropped.

        Raises:
            TensorError: a head of other rows than the embedding has, such as the aligner's.
        """
        tied, rows = self.args.text_config.tie_word_embeddings, self.args.vocab_size
        kept: dict[str, mx.array] = {}
        for name, value in weights.items():
            own = _own_name(name)
            if own == "lm_head.weight" and value.shape[:1] != (rows,):
                raise TensorError(name, f"expected a head of {rows} rows, got {list(value.shape)}")
            if own is None or (tied and own.startswith("lm_head.")):
                continue
            kept[own] = layout(own, value)
        return kept


_PREFIXES = (
    ("model.audio_tower.", "audio_tower."),
    ("model.multi_modal_projector.linear_1.", "audio_tower.proj1."),
    ("model.multi_modal_projector.linear_2.", "audio_tower.proj2."),
    ("model.language_model.", "model."),
)
# Computed, not read.
_TABLES = re.compile(r"\.rotary_emb\.inv_freq$|\.positional_embedding(\.|$)")


def _own_name(name: str) -> str | None:
    name = name.removeprefix("thinker.")
    for theirs, ours in _PREFIXES:
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    return None if _TABLES.search(name) else name


def load_processor(directory: str | Path, config: dict[str, Any]) -> Processor:
    """What turns a clip into this model's inputs and its tokens into text, with the tokenizer.

    Raises:
        FileNotFoundError: no tokenizer is there.
        ValueError: one that cannot be read, or that of another model.
    """
    from .qwen3_asr_processing import Processor

    return Processor.from_directory(directory, ModelArgs.from_dict(config), config)
