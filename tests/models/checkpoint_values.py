"""Small checkpoints in every layout, written to disk, for what loads, saves and converts them."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn
import pytest
from mixture_values import SMALL
from mlx.utils import tree_flatten
from tiny_tokenizer import VOCABULARY
from tiny_tokenizer import write as write_tokenizer

CONFIG: dict[str, Any] = {
    **SMALL,
    "model_type": "glm4_moe",
    "vocab_size": VOCABULARY + 2,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "eos_token_id": [257],
}
ROUTER = "model.layers.1.mlp.gate.weight"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def need_global_scales_of_experts() -> None:
    """Skips where mlx-lm's switch layers cannot make them (0.31)."""
    from mlx_lm.models.switch_layers import SwitchLinear

    if "global_scale" not in inspect.signature(SwitchLinear.to_quantized).parameters:
        pytest.skip("this mlx-lm has no global scales of experts")


def config(**settings: Any) -> dict[str, Any]:
    """CONFIG with these settings; None removes one."""
    return {k: v for k, v in {**CONFIG, **settings}.items() if v is not None or k in CONFIG}


def new_model(settings: dict[str, Any], seed: int = 0) -> mlx_nn.Module:
    """Our GLM4-MoE with random weights, floats in bfloat16 but the correction biases."""
    from mlx_lowbit.models import glm4_moe

    mx.random.seed(seed)
    model = glm4_moe.Model(glm4_moe.ModelArgs.from_dict(settings))
    for name, value in tree_flatten(model.parameters()):
        dtype = mx.float32 if name.endswith("correction_bias") else mx.bfloat16
        scale = value.shape[-1] ** -0.5 if value.ndim > 1 else 0.1
        shift = 1.0 if name.endswith("norm.weight") else 0.0
        new = (mx.random.normal(value.shape) * scale + shift).astype(dtype)
        model.load_weights([(name, new)], strict=False)
    mx.eval(model.parameters())
    return model


def parameters(model: mlx_nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def published(model: mlx_nn.Module, *, mtp: bool = True) -> dict[str, mx.array]:
    """Its weights as published: every expert apart, and a layer for further tokens."""
    weights: dict[str, mx.array] = {}
    for name, value in parameters(model).items():
        found = re.fullmatch(r"(.+\.mlp)\.switch_mlp\.(.+)", name)
        if found is None:
            weights[name] = value
            continue
        for e in range(value.shape[0]):
            weights[f"{found[1]}.experts.{e}.{found[2]}"] = value[e]
    if mtp:
        layer = len(model.layers)
        weights[f"model.layers.{layer}.eh_proj.weight"] = mx.ones((4, 8))
        weights[f"model.layers.{layer}.mlp.experts.0.up_proj.weight"] = mx.ones((4, 8))
    return weights


def fused(model: mlx_nn.Module) -> dict[str, mx.array]:
    """Its weights as transformers holds them: gate and up of all experts in one."""
    weights = {n: v for n, v in parameters(model).items() if ".switch_mlp." not in n}
    for index, layer in enumerate(model.layers):
        if "switch_mlp" in layer.mlp:
            gate, up, down = (layer.mlp.switch_mlp[name].weight for name in PROJECTIONS)
            prefix = f"model.layers.{index}.mlp.experts"
            weights[f"{prefix}.gate_up_proj"] = mx.concatenate([gate, up], axis=1)
            weights[f"{prefix}.down_proj"] = down
    return weights


def write(
    directory: Path,
    weights: dict[str, mx.array],
    settings: dict[str, Any],
    *,
    shards: int = 1,
    index: bool = True,
    tokenizer: bool = True,
) -> Path:
    """A checkpoint directory; with more than one shard, tensors alternate between them."""
    directory.mkdir(parents=True, exist_ok=True)
    names = sorted(weights)
    places: dict[str, str] = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors" if shards > 1 else MODEL
        part = {name: weights[name] for name in names[i::shards]}
        mx.save_safetensors(str(directory / file), part, metadata={"format": "pt"})
        places |= dict.fromkeys(part, file)
    if index and shards > 1:
        text = json.dumps({"metadata": {}, "weight_map": places})
        (directory / INDEX).write_text(text, encoding="utf-8")
    (directory / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    if tokenizer:
        write_tokenizer(directory)
    return directory


MODEL = "model.safetensors"
INDEX = "model.safetensors.index.json"


def checkpoint(directory: Path, seed: int = 0, **settings: Any) -> Path:
    """A published checkpoint of one file, random in bfloat16."""
    own = config(**settings)
    return write(directory, published(new_model(own, seed)), own)


def assert_same(got: mlx_nn.Module | dict[str, Any], want: mlx_nn.Module | dict[str, Any]) -> None:
    """The same parameters by name, dtype and bit."""
    a, b = (m if type(m) is dict else parameters(m) for m in (got, want))
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert mx.array_equal(a[name].view(mx.uint8), b[name].view(mx.uint8)).item(), name
