"""The three model definitions at tiny size, from checkpoint to words, through the commands.

Weights are random, so the words mean nothing; everything else is real: a checkpoint in a
temporary directory, ``convert``, a picture drawn with Pillow, a spoken sentence (espeak-ng's where
that is installed, else a clip that ``benchmarks/make_speech.py`` synthesized), ``generate``,
``describe`` and ``transcribe``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

SENTENCE = "Low bit kernels, spoken aloud."
CLIP = Path(__file__).parent / "demo_model" / "speech.ogg"
TOKENS = "24"
# Special tokens after the 256 bytes, in this order: those of each model's prompts.
MARKS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|audio_start|>", "<|audio_end|>",
    "<|audio_pad|>", "<asr_text>", "<s>", "</s>", "<pad>",
)  # fmt: skip
VOCABULARY = 320
_BYTES = 256
_DECODER = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
}
_TOWER = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "patch_size": 14,
}


def _id(mark: str) -> int:
    return _BYTES + MARKS.index(mark)


class Tiny(NamedTuple):
    """A model: its name, the bits of its weights, what it needs, its configuration."""

    title: str
    bits: int
    needs: tuple[str, ...]  # modules
    extra: str  # of this package, that brings them
    config: dict[str, Any]


GLM = Tiny(
    "GLM4-MoE",
    3,
    (),
    "",
    {
        **_DECODER,
        "model_type": "glm4_moe",
        "moe_intermediate_size": 128,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "tie_word_embeddings": False,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "eos_token_id": [_id("<|endoftext|>")],
        "torch_dtype": "bfloat16",
    },
)
MOXIN = Tiny(
    "Moxin VLM",
    8,
    ("PIL",),
    "vlm",
    {
        "model_type": "prismatic",
        "vision_backbone_config": {
            "featurizer": {**_TOWER, "num_register_tokens": 4},
            "fused_featurizer": _TOWER,
        },
        "image_sizes": [56, 56],
        "image_resize_strategy": "resize-naive",
        "pad_token_id": _id("<pad>"),
        "text_config": {**_DECODER, "model_type": "mistral", "sliding_window": None},
        "torch_dtype": "bfloat16",
    },
)
QWEN = Tiny(
    "Qwen3-ASR",
    8,
    ("soundfile",),
    "audio",
    {
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        "model_type": "qwen3_asr",
        "thinker_config": {
            "model_type": "qwen3_asr",
            "dtype": "bfloat16",
            "audio_token_id": _id("<|audio_pad|>"),
            "audio_config": {
                "num_mel_bins": 128,
                "d_model": 64,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 128,
                "downsample_hidden_size": 8,
                "n_window": 50,
                "n_window_infer": 800,
                "output_dim": 128,
                "max_source_positions": 1500,
            },
            "text_config": {**_DECODER, "tie_word_embeddings": True, "rope_theta": 1000000},
        },
    },
)


def write_checkpoint(tiny: Tiny, directory: Path, seed: int = 0) -> None:
    """A checkpoint of random weights in bfloat16, with a tokenizer of bytes."""
    from . import models

    mx.random.seed(seed)
    module = models.module_for(tiny.config)
    model = module.Model(module.ModelArgs.from_dict(tiny.config))
    weights = {}
    for name, value in tree_flatten(model.parameters()):
        fan_in = value.size // value.shape[0] if value.ndim > 1 else 100
        shift = 1.0 if value.ndim == 1 and name.endswith("weight") else 0.0
        new = mx.random.normal(value.shape) * fan_in**-0.5 + shift
        correction = name.endswith("e_score_correction_bias")  # the router's stay in float32
        weights[name] = new if correction else new.astype(mx.bfloat16)
    directory.mkdir(parents=True)
    mx.save_safetensors(str(directory / "model.safetensors"), weights, metadata={"format": "mlx"})
    (directory / "config.json").write_text(json.dumps(tiny.config), encoding="utf-8")
    write_tokenizer(directory)


def write_tokenizer(directory: Path) -> None:
    """Files of a tokenizer whose tokens are bytes and MARKS."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|endoftext|>", pad_token="<pad>"
    ).save_pretrained(directory)


def draw(path: Path) -> None:
    """A house in the sun, 120 x 90 pixels."""
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (120, 90), "lightblue")
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, 65, 120, 90), fill="green")
    pen.ellipse((85, 8, 110, 33), fill="yellow")
    pen.rectangle((25, 40, 70, 75), fill="brown")
    pen.polygon(((20, 40), (47, 18), (75, 40)), fill="red")
    picture.save(path)


def speak(folder: Path) -> tuple[Path, str]:
    """A recording of a sentence, and who speaks it."""
    program = shutil.which("espeak-ng")
    spoken = folder / "speech.wav"
    if program is not None:
        command = [program, "-w", str(spoken), SENTENCE]
        if subprocess.run(command, capture_output=True, timeout=60).returncode == 0:
            return spoken, "espeak-ng"
    return CLIP, "a synthesized clip"


def missing(tiny: Tiny) -> str | None:
    """What to install for a model, or None."""
    absent = [name for name in tiny.needs if importlib.util.find_spec(name) is None]
    return f"needs pip install 'mlx-lowbit[{tiny.extra}]'" if absent else None


def _command(name: str, *arguments: str) -> None:
    print(f"$ mlx_lowbit.{name} {shlex.join(arguments)}", flush=True)
    main: Callable[[list[str]], int] = importlib.import_module(f"mlx_lowbit.{name}").main
    if status := main(list(arguments)):
        raise RuntimeError(f"mlx_lowbit.{name} ended with status {status}")


def run(seed: int = 0) -> None:
    """Shows all three, printing what the commands print.

    Raises:
        RuntimeError: a command that did not end well.
    """
    with tempfile.TemporaryDirectory(prefix="mlx_lowbit-demo-") as temporary:
        folder = Path(temporary)
        for tiny in (GLM, MOXIN, QWEN):
            print(f"\n{tiny.title}, tiny, random weights in {tiny.bits} bits")
            if reason := missing(tiny):
                print(f"left out: {reason}")
                continue
            source = folder / tiny.config["model_type"]
            model = str(source) + f"-{tiny.bits}bit"
            write_checkpoint(tiny, source, seed)
            _command(
                "convert",
                "--hf-path",
                str(source),
                "--mlx-path",
                model,
                "-q",
                "--q-bits",
                str(tiny.bits),
            )
            options = ("--model", model, "--max-tokens", TOKENS)
            if tiny is GLM:
                _command("generate", *options, "--prompt", "def ")
            elif tiny is MOXIN:
                draw(folder / "picture.png")
                _command("describe", str(folder / "picture.png"), *options)
            else:
                audio, speaker = speak(folder)
                print(f"speech: {speaker}")
                _command("transcribe", str(audio), *options, "--language", "English")
