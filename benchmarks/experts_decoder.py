"""A full-size mixture of experts through mlx-lm: tokens-per-sec with MLX's layers and with ours.

    python -m benchmarks.experts_decoder [--bits 3] [--layers 46] [--budget 480] [--json FILE]

The model has the shape of GLM-4.5-Air (46 layers of 4096, 96/8 heads, 128 experts of 1408 of which
each token meets 8, a shared one, a dense first layer, vocabulary 151552; 107e9 weights, 47 GB in 3
bits with their scales and biases). Codes are random words, made on the device, layer by layer:
nothing is downloaded and no float weight ever exists. One model serves all runs, in this order:
`ours-B` after `mlx_lowbit.accelerate`, `mlx-B` after `undo`; `apart-B` is ours without merged
products. Every prompt has `--prompt` tokens over all sequences together. Prefill is the median of
three after a first one, with what is compiled then; decoding is greedy. Rows are written as
they come, and none begins after `--budget` seconds: MLX's products of experts take that long.
"""

from __future__ import annotations

import argparse
import datetime
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lowbit
from mlx.utils import tree_flatten
from tqdm import tqdm

from benchmarks import generation
from benchmarks.device import device_name

CONFIG = {
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "first_k_dense_replace": 1,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "use_qk_norm": False,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 131072,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
GROUP_SIZE = 64
# Deviations of weights. A token's embedding outweighs what the layers add to it: where all weights
# had 0.02, tokens of a prompt came to be alike, and 8 of 128 experts met 4 in 5 of them.
DEVIATION, OF_EMBEDDING = 0.02, 1.0
ADDED = ("o_proj", "down_proj")
RESULTS = Path(__file__).parent / "results"


def build(config: dict[str, Any], bits: int) -> nn.Module:
    """The model with random weights, its linear layers, experts and embedding in `bits` bits."""
    from mlx_lm.models.glm4_moe import Model, ModelArgs

    model = Model(ModelArgs.from_dict(config))
    # What both make is lazy, and replaced before it is computed.
    nn.quantize(model, group_size=GROUP_SIZE, bits=bits)
    modules = dict(model.named_modules())
    for path, module in tqdm(modules.items(), desc="weights", disable=None):
        deviation = OF_EMBEDDING if path.endswith("embed_tokens") else DEVIATION
        if path.endswith(ADDED):
            deviation /= (2 * len(model.layers)) ** 0.5
        fill(module, bits, deviation)
        mx.eval([value for value in module.values() if isinstance(value, mx.array)])
    mx.clear_cache()
    return model.eval()


def fill(module: nn.Module, bits: int, deviation: float) -> None:
    """Random values for the arrays that `module` itself holds."""
    if "scales" in module:
        steps = 2**bits - 1
        # Codes are uniform: their deviation is that of the integers from 0 to `steps`.
        scale = deviation / (((steps + 1) ** 2 - 1) / 12) ** 0.5
        shape = module.scales.shape
        module.weight = random_words(module.weight.shape)
        module.scales = mx.random.uniform(0.9 * scale, 1.1 * scale, shape).astype(mx.bfloat16)
        module.biases = -steps / 2 * module.scales
        names = ["bias"] if "bias" in module else []
    else:
        names = [name for name, value in module.items() if isinstance(value, mx.array)]
    for name in names:
        shape = module[name].shape
        if isinstance(module, nn.RMSNorm):
            module[name] = mx.ones(shape, mx.bfloat16)
        elif name == "e_score_correction_bias":
            module[name] = mx.zeros(shape, mx.float32)
        else:
            module[name] = (deviation * mx.random.normal(shape)).astype(mx.bfloat16)


def random_words(shape: tuple[int, ...]) -> mx.array:
    """Random bits, uint32: new keys are what MLX calls them."""
    count = math.prod(shape)
    seed = mx.random.key(random.getrandbits(32))
    return mx.random.split(seed, -(-count // 2)).flatten()[:count].reshape(shape)


def turn(model: nn.Module, who: str) -> None:
    """Makes `model` run the layers of `who`."""
    if who == "mlx":
        mlx_lowbit.undo(model)
    else:
        mlx_lowbit.accelerate(model, **({"merge": False} if who == "apart" else {}))


def measure(
    model: nn.Module, names: list[str], bits: int, prompts: list[tuple[int, int]], tokens: int
) -> Iterator[dict[str, Any]]:
    """A row for every (whose layers, prompt)."""
    for who in names:
        turn(model, who)
        for batch, prompt in prompts:
            models = {f"{who}-{bits}": model}
            yield from generation.measure(models, model.args.vocab_size, batch, prompt, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--who", nargs="+", choices=["ours", "apart", "mlx"], default=["ours", "mlx"]
    )
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of all sequences")
    parser.add_argument("--tokens", type=int, default=100, help="decoded for each sequence")
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--experts", type=int, default=CONFIG["n_routed_experts"])
    parser.add_argument("--hidden", type=int, default=CONFIG["hidden_size"])
    parser.add_argument("--width", type=int, default=CONFIG["moe_intermediate_size"])
    parser.add_argument("--heads", type=int, default=CONFIG["num_attention_heads"])
    parser.add_argument("--vocabulary", type=int, default=CONFIG["vocab_size"])
    parser.add_argument("--budget", type=float, default=480, help="seconds, see above")
    parser.add_argument("--json", type=Path, help="default: in benchmarks/results")
    options = parser.parse_args()
    if options.tokens < 5:
        parser.error(f"--tokens: expected 5 or more, got {options.tokens}")
    begin = time.perf_counter()
    config = CONFIG | {
        "num_hidden_layers": options.layers,
        "n_routed_experts": options.experts,
        "num_experts_per_tok": min(CONFIG["num_experts_per_tok"], options.experts),
        "hidden_size": options.hidden,
        "moe_intermediate_size": options.width,
        "num_attention_heads": options.heads,
        "vocab_size": options.vocabulary,
    }
    model = build(config, options.bits)
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    seconds = time.perf_counter() - begin
    print(f"{nbytes / 1e9:.2f} GB of weights, made in {seconds:.1f} s", flush=True)
    name = "-".join(device_name().lower().split())
    path = options.json or RESULTS / f"{name}-experts-decoder-{datetime.date.today()}.json"
    prompts = [(batch, max(1, options.prompt // batch)) for batch in options.batch]
    rows: list[dict[str, Any]] = []
    left_out = len(options.who) * len(prompts)
    for row in measure(model, options.who, options.bits, prompts, options.tokens):
        rows.append(row)
        left_out -= 1
        generation.show(row)
        about = {"config": config, "weights_gb": round(nbytes / 1e9, 2), "left_out": left_out}
        generation.write(path, rows, **about)
        if left_out and time.perf_counter() - begin > options.budget:
            print(f"--budget {options.budget:.0f}: {left_out} rows are left out", flush=True)
            break
    print(path)


if __name__ == "__main__":
    main()
