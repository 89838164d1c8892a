"""A full-size Qwen3-ASR-0.6B on this machine's CPU: with this package's layers and with MLX's own.

    python -m benchmarks.transcribe [--seconds 1 --tokens 4] [--long 30] [--out FILE]

Random weights in the shape of the published model, text decoder in 8 bits, audio encoder in
bfloat16; nothing is downloaded. The same arrays run on both: `ours` is the model as
``mlx_lowbit.load`` gives it, `MLX` the same after ``mlx_lowbit.undo``. Both hear a clip of
`--seconds` and write `--tokens` tokens; ours also hears one of `--long` seconds, with four tokens
for each of them, which is how many speech makes. MLX takes seconds a token, so its clip is short:
each of its figures is one run, ours are medians of five.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lowbit
import numpy as np
from mlx.utils import tree_flatten
from mlx_lowbit.build import Change, build
from mlx_lowbit.models import qwen3_asr
from mlx_lowbit.models.qwen3_asr_audio import log_mel, output_length
from mlx_lowbit.recipes import Storage

from benchmarks import generation

AUDIO_TOKEN, AROUND, RATE, TOKENS_A_SECOND = 151676, 15, 16000, 4
CONFIG = {
    "model_type": "qwen3_asr",
    "thinker_config": {
        "dtype": "bfloat16",
        "audio_token_id": AUDIO_TOKEN,
        "audio_config": {
            "d_model": 896, "encoder_layers": 18, "encoder_attention_heads": 14,
            "encoder_ffn_dim": 3584, "output_dim": 1024, "num_mel_bins": 128,
            "downsample_hidden_size": 480, "n_window": 50, "n_window_infer": 800,
            "max_source_positions": 1500,
        },
        "text_config": {
            "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
            "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
            "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
            "tie_word_embeddings": True, "max_position_embeddings": 65536,
        },
    },
}  # fmt: skip


def model_of_random_weights() -> nn.Module:
    """The model, quantized a tensor at a time."""
    mx.random.seed(0)
    change = Change(storage=Storage("affine", 8, 64), dtype=mx.bfloat16)
    model = build(qwen3_asr, CONFIG, change)
    for _, value in tree_flatten(model.parameters()):
        mx.eval(value)
    return model


def seconds_of(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    mx.eval(run())
    return time.perf_counter() - begin


def hear(model: nn.Module, audio_seconds: float, tokens: int) -> dict[str, float]:
    """Seconds of each part of a transcript."""
    from mlx_lm.models.cache import make_prompt_cache

    begin = time.perf_counter()
    noise = np.random.default_rng(0).standard_normal(round(audio_seconds * RATE))
    features = mx.array(log_mel(0.1 * noise.astype(np.float32)))
    parts = {"mel_s": time.perf_counter() - begin}
    parts["encoder_s"] = seconds_of(lambda: model.audio_features(features))
    heard = model.audio_features(features)
    mx.eval(heard)
    count = output_length(features.shape[1])
    ids = mx.array([[1000 + i for i in range(AROUND)]])
    x = model.model.embed(ids)
    x = mx.concatenate([x[:, :9], heard[None].astype(x.dtype), x[:, 9:]], axis=1)
    cache = make_prompt_cache(model)
    begin = time.perf_counter()
    token = mx.argmax(model(None, cache=cache, input_embeddings=x)[:, -1], axis=-1)
    mx.eval(token)
    parts["prefill_s"] = time.perf_counter() - begin
    begin = time.perf_counter()
    for _ in range(tokens - 1):
        token = mx.argmax(model(token[:, None], cache=cache)[:, -1], axis=-1)
        mx.eval(token)
    parts["decode_s"] = time.perf_counter() - begin
    total = sum(parts.values())
    return {
        **parts,
        "audio_s": audio_seconds,
        "tokens": tokens,
        "prompt_tokens": count + AROUND,
        "total_s": total,
        "real_time_factor": total / audio_seconds,
        "prompt_tokens_per_sec": (count + AROUND) / parts["prefill_s"],
        "tokens_per_sec": (tokens - 1) / parts["decode_s"],
    }


def median_of(runs: list[dict[str, float]]) -> dict[str, float]:
    """Medians, and the spread of the whole."""
    result = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    totals = [run["total_s"] for run in runs]
    return {**result, "spread": (max(totals) - min(totals)) / result["total_s"]}


def show(whose: str, row: dict[str, float]) -> None:
    print(
        f"{whose:<5} {row['audio_s']:5.1f} s of audio: encoder {row['encoder_s']:8.3f} s  "
        f"prompt {row['prompt_tokens']:.0f} tokens, {row['prompt_tokens_per_sec']:8.2f} tokens-per-sec  "
        f"generation {row['tokens']:.0f} tokens, {row['tokens_per_sec']:7.2f} tokens-per-sec  "
        f"real-time factor {row['real_time_factor']:.3f}",
        flush=True,
    )


def main() -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--long", type=float, default=30.0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    model = model_of_random_weights()
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    print(f"weights: {size / 1e9:.3f} GB", flush=True)
    mlx_lowbit.accelerate(model)
    hear(model, args.seconds, args.tokens)  # threads start, caches fill
    rows = {"ours": median_of([hear(model, args.seconds, args.tokens) for _ in range(5)])}
    show("ours", rows["ours"])
    long = args.long, round(args.long * TOKENS_A_SECOND)
    rows["ours, long"] = median_of([hear(model, *long) for _ in range(3)])
    show("ours", rows["ours, long"])
    mlx_lowbit.undo(model)
    rows["MLX"] = hear(model, args.seconds, args.tokens)
    show("MLX", rows["MLX"])
    ours, mlx = rows["ours"], rows["MLX"]
    ratios = {
        name: mlx[name] / ours[name] for name in ("total_s", "encoder_s", "prefill_s", "decode_s")
    }
    print("MLX's time over ours:", ", ".join(f"{k} {v:.1f}" for k, v in ratios.items()))
    if args.out is not None:
        table = [{"layers": whose, **row} for whose, row in rows.items()]
        generation.write(args.out, table, bytes=size, ratios=ratios)


if __name__ == "__main__":
    main()
