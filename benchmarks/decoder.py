"""A full-size decoder through mlx-lm: tokens-per-sec with MLX's layers and with this package's.

    python -m benchmarks.decoder [--weights bf16 mlx-4 ours-4] [--batch 1 16] [--prompt 2048]

The model has the shape of Moxin-7B's decoder (Mistral: 36 layers, 4096, 14336, 32/8 heads,
vocabulary 32064) and random weights, made on the device: nothing is downloaded. `mlx-B` are MLX's
quantized layers with B bits (group 64), `ours-B` the same model after `mlx_lowbit.accelerate`;
`mxfp8` and `nvfp4` stand where a number of bits does. Prefill is the median of three, after a first
one (`first`, in seconds) with what is compiled then; decoding is greedy. The models stay in memory
and take turns, and ratios to bf16 are of such turns: at batch 1 the host is what bounds most of
them. Peak memory is a model's own, of its prompts; where not all of them fit (some 45 GB of
weights, 30 of caches at batch 16), fewer `--weights` are measured at a time.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lowbit
from tqdm import tqdm

from benchmarks import generation

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def build(weights: str, layers: int):
    """The model, with random weights quantized as `weights` says."""
    from mlx.utils import tree_map
    from mlx_lm.models.llama import Model, ModelArgs

    model = Model(ModelArgs.from_dict(CONFIG | {"num_hidden_layers": layers}))
    model.update(
        tree_map(
            lambda p: (0.02 * mx.random.normal(p.shape)).astype(mx.bfloat16), model.parameters()
        )
    )
    for layer in model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight = mx.ones_like(norm.weight)
    whose, _, fmt = weights.partition("-")
    if fmt.isdigit():
        nn.quantize(model, group_size=64, bits=int(fmt))
    elif fmt:
        shape = mlx_lowbit.formats.get(fmt)
        nn.quantize(model, group_size=shape.group_size, bits=shape.bits, mode=fmt)
    mx.eval(model.parameters())
    if whose == "ours":
        mlx_lowbit.accelerate(model)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--weights", nargs="+", default=["bf16", "mlx-8", "ours-8", "mlx-4", "ours-4", "ours-3"]
    )
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--layers", type=int, default=CONFIG["num_hidden_layers"])
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    names = tqdm(options.weights, desc="models", disable=None)
    models = {name: build(name, options.layers) for name in names}
    rows: list[dict] = []
    for batch in options.batch:
        of_batch = generation.measure(
            models, CONFIG["vocab_size"], batch, options.prompt, options.tokens
        )
        for row in of_batch:
            generation.show(row)
        rows += of_batch
        if options.json:
            generation.write(options.json, rows)


if __name__ == "__main__":
    main()
