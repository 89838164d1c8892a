"""Trains the model of ``mlx_lowbit.demo_model`` with torch: a Llama-shaped model over bytes.

    python benchmarks/train_demo_model.py

The text is the source of this interpreter's standard library, less the files that
``demo_model.is_held_out`` names. Matrices are trained with Muon, the embedding and the norms with
AdamW, under one learning rate that rises over the first 3 % of the steps and then falls linearly to
zero. The first half of the steps sees windows of half the context: attention costs less there, and
the number of tokens a step stays the same.

Every file is written to a temporary name and renamed, at each checkpoint and at the end. Every
dimension that is quantized along (hidden, intermediate, heads x head_dim) is a multiple of 128, so
that each group size divides it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mlx_lowbit import demo_model
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

END_TOKEN = "<|endoffile|>"
CONFIG_KEYS = (
    "attention_bias",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "model_type",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "tie_word_embeddings",
    "vocab_size",
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).resolve().parent / "demo_model",
        help="directory for the model and its tokenizer (default: benchmarks/demo_model)",
    )
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512, help="tokens in a window")
    parser.add_argument("--learning-rate", type=float, default=6e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-every", type=int, default=300)
    return parser.parse_args(argv)


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """Random weights, but zero in the two projections that add to the residual stream."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=demo_model.VOCABULARY,
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_hidden_layers=args.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            head_dim=args.head_dim,
            max_position_embeddings=2 * args.context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=demo_model.END_OF_FILE,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
    return model


def windows(stream: np.ndarray, args: argparse.Namespace) -> Iterator[torch.Tensor]:
    """Endless batches, int64 [tokens_per_step / context, context + 1].

    An epoch visits every window once, from a start drawn anew. The context doubles at half of the
    steps.
    """
    rng = np.random.default_rng(args.seed)
    step = 0
    while True:
        short = step < args.steps // 2
        context = args.context // 2 if short else args.context
        batch = args.tokens_per_step // context
        starts = np.arange(rng.integers(context), len(stream) - context, context)
        rng.shuffle(starts)
        for i in range(0, len(starts) - batch + 1, batch):
            rows = starts[i : i + batch, None] + np.arange(context + 1)
            yield torch.from_numpy(stream[rows])
            step += 1
            if short and step >= args.steps // 2:
                break


def optimizers(model: LlamaForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed_tokens" not in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices,
            lr=args.learning_rate,
            weight_decay=args.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(others, lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate(step: int, args: argparse.Namespace) -> float:
    rise = max(1, round(0.03 * args.steps))
    return args.learning_rate * min(
        (step + 1) / rise, (args.steps - step) / max(1, args.steps - rise)
    )


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor, *, bfloat16: bool) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, rows: np.ndarray) -> float:
    """Mean negative log-likelihood in nats per byte over rows [windows, context + 1]."""
    batches = torch.from_numpy(rows).split(8)
    total = sum(loss_of(model, batch, bfloat16=False).item() * len(batch) for batch in batches)
    return total / len(rows)


def train(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    stream = demo_model.token_stream(demo_model.library_files(held_out=False))
    unseen = demo_model.token_stream(demo_model.library_files(held_out=True))
    probe = demo_model.even_windows(unseen, count=32, context=args.context)
    model = build_model(args)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count:,} parameters, {len(stream):,} bytes to train on, {len(unseen):,} held out")
    steppers = optimizers(model, args)
    bar = tqdm(range(args.steps), unit="step", mininterval=5)
    for step, batch in zip(bar, windows(stream, args), strict=False):
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = learning_rate(step, args)
        loss = loss_of(model, batch, bfloat16=True)
        loss.backward()
        for stepper in steppers:
            stepper.step()
            stepper.zero_grad(set_to_none=True)
        if (step + 1) % args.checkpoint_every == 0:
            nats = held_out_loss(model, probe)
            bar.write(
                f"step {step + 1}: training {loss.item():.4f}, held out {nats:.4f} nats per byte"
            )
            save(model, args)
    return model


def tokenizer() -> Tokenizer:
    """A byte-level BPE without merges, ordered so that a token's id is its byte."""
    letters = {letter: byte for byte, letter in enumerate(_byte_letters())}
    result = Tokenizer(models.BPE(vocab=letters, merges=[]))
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    result.decoder = decoders.ByteLevel()
    result.add_special_tokens([END_TOKEN])
    return result


def _byte_letters() -> list[str]:
    """The character that byte-level BPE writes for each byte: the byte's own if it is printable."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in own else chr(next(spare)) for byte in range(256)]


def save(
    model: LlamaForCausalLM, args: argparse.Namespace, record: dict[str, Any] | None = None
) -> None:
    """Writes weights (bfloat16, the tied head left out), config, tokenizer, list and record."""
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {n: p.detach().to(torch.bfloat16).contiguous() for n, p in model.named_parameters()}
    _replace(
        args.out / "model.safetensors",
        lambda path: save_file(weights, path, metadata={"format": "pt"}),
    )
    _replace(args.out / "tokenizer.json", lambda path: tokenizer().save(str(path)))
    _write_json(args.out / "config.json", config_of(model))
    _write_json(
        args.out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": END_TOKEN,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 2 * args.context,
        },
    )
    root = demo_model.library_root()
    unseen = demo_model.library_files(held_out=True)
    _write_json(args.out / "held_out.json", [path.relative_to(root).as_posix() for path in unseen])
    if record is not None:
        _write_json(args.out / "training.json", record)


def config_of(model: LlamaForCausalLM) -> dict[str, Any]:
    """``config.json`` as mlx-lm and transformers read it."""
    values = {key: getattr(model.config, key) for key in CONFIG_KEYS}
    return values | {
        "architectures": ["LlamaForCausalLM"],
        "torch_dtype": "bfloat16",
        "rope_theta": 10000.0,
    }


def _write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    _replace(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors leaves 0600, which a package would carry to its users
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    began = time.monotonic()
    model = train(args)
    model.load_state_dict({n: p.to(torch.bfloat16).float() for n, p in model.state_dict().items()})
    unseen = demo_model.token_stream(demo_model.library_files(held_out=True))
    rows = demo_model.even_windows(unseen, count=len(unseen), context=args.context)
    nats = held_out_loss(model, rows)
    record = {
        "options": {
            k: v for k, v in vars(args).items() if k not in ("out", "threads", "checkpoint_every")
        },
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tokens": args.steps * args.tokens_per_step,
        "held_out_bytes": rows[:, 1:].size,
        "held_out_nats_per_byte": round(nats, 4),
        "held_out_bits_per_byte": round(nats / math.log(2), 4),
        "held_out_perplexity_per_byte": round(math.exp(nats), 4),
        "minutes": round((time.monotonic() - began) / 60, 1),
    }
    save(model, args, record)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
