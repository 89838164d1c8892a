"""Qwen3-ASR as transformers computes it, its weights in every published layout, clips, and a small
tokenizer of Qwen's kind."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import oracle
from layer_values import decoded
from mlx.utils import tree_flatten

SECONDS = (0.3, 1, 8.1, 30, 95)
EOS = 258  # <|endoftext|>: the first after 256 bytes and two merges
MARKS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|audio_start|>",
    "<|audio_end|>",
    "<|audio_pad|>",
    "<asr_text>",
    "<timestamp>",
)
PAD = EOS + MARKS.index("<|audio_pad|>")
AUDIO = {
    "num_mel_bins": 128,
    "d_model": 64,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "downsample_hidden_size": 8,
    "n_window": 50,
    "n_window_infer": 800,
    "output_dim": 64,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 288,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def flat(**changes: Any) -> dict[str, Any]:
    """``config.json`` as transformers writes it, with these keys changed at the top."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    config = {
        "model_type": "qwen3_asr",
        "audio_config": {**AUDIO, "model_type": "qwen3_asr_encoder", "max_position_embeddings": 13},
        "text_config": {**TEXT, "model_type": "qwen3", "rope_parameters": rope},
        "audio_token_id": PAD,
        "eos_token_id": [EOS],
        "pad_token_id": EOS,
        "tie_word_embeddings": True,
    }
    return {**config, **changes}


def nested(**changes: Any) -> dict[str, Any]:
    """The same as the original files have it; `changes` are of thinker_config."""
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "interleaved": True}
    audio = {**AUDIO, "model_type": "qwen3_asr_audio_encoder", "max_source_positions": 1500}
    thinker = {
        "model_type": "qwen3_asr",
        "dtype": "bfloat16",
        "audio_token_id": PAD,
        "audio_config": audio,
        "text_config": {**TEXT, "rope_theta": 1000000, "rope_scaling": rope},
    }
    return {
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        "model_type": "qwen3_asr",
        "support_languages": ["Chinese", "English", "German"],
        "thinker_config": {**thinker, **changes},
    }


# --- transformers -------------------------------------------------------------------------------


def transformers_model(seed: int = 0) -> Any:
    """transformers' model in float32 with random weights of every kind."""
    import torch
    from transformers import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

    config = Qwen3ASRConfig(**flat(), attn_implementation="eager")
    model = Qwen3ASRForConditionalGeneration(config).eval().requires_grad_(False)
    torch.manual_seed(seed)
    for name, value in model.named_parameters():
        if value.ndim == 1:
            value.copy_(torch.randn(value.shape) * 0.1 + (0 if name.endswith("bias") else 1))
        else:
            value.copy_(torch.randn(value.shape) / value[0].numel() ** 0.5)
    return model


def weights(model: Any, layout: str) -> dict[str, mx.array]:
    """Its tensors as in the files of a layout: "transformers", "original" or "mlx"."""
    renamed = {
        "model.multi_modal_projector.linear_1.": "model.audio_tower.proj1.",
        "model.multi_modal_projector.linear_2.": "model.audio_tower.proj2.",
    }
    found = {}
    for name, value in model.state_dict().items():
        array = mx.array(value.float().numpy())
        if layout == "transformers":
            found[name] = array
            continue
        for theirs, other in renamed.items():
            name = name.replace(theirs, other)
        name = name.replace("model.audio_tower.", "audio_tower.")
        name = name.replace("model.language_model.", "model.")
        if layout == "original":
            found[f"thinker.{name}"] = array
        elif name != "lm_head.weight":
            found[name] = array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
    return found


def with_decoded_weights(model: Any, quantized: mlx_nn.Module) -> Any:
    """A float64 copy of transformers' ``model`` with the weights that ``quantized`` stands for."""
    import torch

    twin = copy.deepcopy(model).double()
    state = twin.state_dict()
    for path, layer in quantized.named_modules():
        if "scales" in layer:
            name = path.replace("model.", "model.language_model.", 1)
            state[f"{name}.weight"].copy_(torch.from_numpy(decoded(layer)))
    return twin


def extractor() -> Any:
    from transformers import Qwen3ASRFeatureExtractor

    return Qwen3ASRFeatureExtractor()


def features(samples: np.ndarray) -> tuple[Any, Any]:
    """What transformers' extractor makes of a clip: float32 [1, 128, padded], and its mask."""
    found = extractor()(
        [samples],
        sampling_rate=16000,
        padding=True,
        truncation=False,
        return_attention_mask=True,
    )
    return found["input_features"], found["attention_mask"]


def valid(samples: np.ndarray) -> np.ndarray:
    """The same without what was filled up: float32 [128, frames]."""
    values, mask = features(samples)
    return values[0, :, : int(mask.sum())].numpy()


def exact_mel(samples: np.ndarray) -> np.ndarray:
    """The extractor's formula with its filters in float64 throughout, [128, frames].

    The extractor itself computes in float32, which is up to 1e-4 off where a band is 80 dB below
    the loudest.
    """
    import torch

    wave = torch.from_numpy(np.pad(samples, (0, max(0, 8000 - samples.size)))).double()
    window = torch.hann_window(400, dtype=torch.float64)
    spectrum = torch.stft(wave, 400, 160, window=window, return_complex=True)[..., :-1]
    mel = torch.from_numpy(extractor().mel_filters).T @ spectrum.abs() ** 2
    mel = torch.clamp(mel, min=1e-10).log10()
    return ((torch.maximum(mel, mel.max() - 8) + 4) / 4).numpy()


def heard(model: Any, samples: np.ndarray) -> np.ndarray:
    """The rows that transformers puts into a prompt, [tokens, hidden]."""
    values, mask = features(samples)
    return model.get_audio_features(values.to(model.dtype), mask).pooler_output.numpy()


def logits(model: Any, tokens: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """transformers' logits for tokens [1, L], [1, L, vocab]."""
    import torch

    values, mask = features(samples)
    return model(
        input_ids=torch.from_numpy(tokens),
        input_features=values.to(model.dtype),
        input_features_mask=mask,
    ).logits.numpy()


def greedy(model: Any, tokens: np.ndarray, samples: np.ndarray, count: int) -> list[int]:
    """The likeliest tokens after tokens [1, L], by transformers' generation."""
    import torch

    values, mask = features(samples)
    found = model.generate(
        input_ids=torch.from_numpy(tokens),
        input_features=values.to(model.dtype),
        input_features_mask=mask,
        max_new_tokens=count,
        min_new_tokens=count,
        do_sample=False,
    )
    return found[0, tokens.shape[1] :].tolist()


# --- ours ---------------------------------------------------------------------------------------


def load(theirs: Any, layout: str = "transformers") -> mlx_nn.Module:
    """Our model with the weights of transformers'."""
    from mlx_lowbit.models import qwen3_asr

    model = qwen3_asr.Model(qwen3_asr.ModelArgs.from_dict(flat()))
    model.load_weights(list(model.sanitize(weights(theirs, layout)).items()))
    return model.eval()


def quantize(model: mlx_nn.Module, fmt: Any, *, audio: bool = False) -> mlx_nn.Module:
    """Everything that ``quant_predicate`` leaves in a format, in place."""
    mlx_nn.quantize(
        model,
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
        class_predicate=lambda path, layer: (
            hasattr(layer, "to_quantized") and (audio or model.quant_predicate(path, layer))
        ),
    )
    return model


def parameters(model: mlx_nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def assert_same(ours: dict[str, mx.array], other: dict[str, mx.array]) -> None:
    """Same names, and the same bits in each."""
    assert ours.keys() == other.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(
            oracle.to_numpy(value), oracle.to_numpy(other[name]), err_msg=name
        )


# --- clips, prompts, a tokenizer ----------------------------------------------------------------


def clip(seconds: float, seed: int = 0) -> np.ndarray:
    """Noise that comes and goes as speech does, with a gliding tone: float32 [samples]."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * 16000)) / 16000
    envelope = 0.2 + np.sin(2 * np.pi * 1.7 * t) ** 2
    tone = 0.05 * np.sin(2 * np.pi * (180 + 40 * np.sin(t)) * t)
    return (envelope * (0.1 * rng.standard_normal(t.size) + tone)).astype(np.float32)


def tonal(seconds: float) -> np.ndarray:
    """Gliding tones with pauses, 30 dB above the noise: float32 [samples]."""
    t = np.arange(round(seconds * 16000)) / 16000
    tone = 0.3 * np.sin(2 * np.pi * (200 + 300 * t) * t) * (np.sin(3 * t) > 0)
    return (tone + 0.01 * np.random.default_rng(0).standard_normal(t.size)).astype(np.float32)


def prompt(places: int) -> np.ndarray:
    """A prompt with so many places for audio, [1, L]."""
    return np.array([[259, 5, 6, 260, 261, *[PAD] * places, 262, 260, 7, 8, 9]])


def write_tokenizer(directory: Path, *, special: bool = True, kind: str = "vocab") -> None:
    """Tokenizer files of 256 bytes, two merges and MARKS.

    Args:
        special: whether ``<asr_text>`` is a special token.
        kind: "vocab" for vocab.json and merges.txt, "json" for tokenizer.json.
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "en", "Ġl"])}
    added = {
        str(EOS + i): {"content": mark, "special": special or not mark.startswith("<asr")}
        for i, mark in enumerate(MARKS)
    }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (directory / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (directory / "merges.txt").write_text("#version: 0.2\ne n\nĠ l\n", encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if kind == "json":
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(directory).save_pretrained(directory)
        (directory / "vocab.json").unlink(missing_ok=True)
        (directory / "merges.txt").unlink(missing_ok=True)
