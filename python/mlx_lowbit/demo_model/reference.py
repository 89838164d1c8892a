"""The Llama of mlx-lm in numpy float64: what the logits of a quantized model are measured against.

The weights are the stored codes decoded to float32 by ``mx.dequantize`` from float32 scales and
biases, within two roundings of the exact value and through none of this package's code, then
widened. Activations never leave float64. So the difference to a model's own logits is what its
kernels and its activation type add, and none of what quantization itself costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]


def decoded_weights(model: Any) -> Weights:
    """The parameters of a model in float64, quantized layers decoded, named as in the dense model.

    Args:
        model: a module of stock MLX layers (not accelerated), any mixture of dense and quantized.

    Returns:
        ``{"<layer>.weight": [N, K] or [K], ...}``.
    """
    import mlx.core as mx
    from mlx import nn
    from mlx.utils import tree_flatten

    result: Weights = {}
    for name, module in tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module):
        for key, value in module.parameters().items():
            if key not in ("scales", "biases"):
                result[f"{name}.{key}"] = value
        if "scales" in module:
            result[f"{name}.weight"] = _decode(module)
    return {
        name: np.array(value.astype(mx.float32)).astype(np.float64)
        for name, value in result.items()
    }


def llama_logits(weights: Weights, config: dict[str, Any], tokens: list[int]) -> np.ndarray:
    """Logits after each token, float64 [T, V].

    Args:
        weights: as :func:`decoded_weights` returns them.
        config: ``config.json`` of a Llama with a tied head, RoPE without scaling and no biases.
        tokens: T token ids.
    """
    angles = _rope_angles(len(tokens), config)
    table = weights["model.embed_tokens.weight"]
    h = table[tokens]
    for i in range(config["num_hidden_layers"]):

        def linear(x: np.ndarray, name: str, prefix: str = f"model.layers.{i}.") -> np.ndarray:
            return x @ weights[f"{prefix}{name}.weight"].T

        def norm(x: np.ndarray, name: str, prefix: str = f"model.layers.{i}.") -> np.ndarray:
            return _rms_norm(x, weights[f"{prefix}{name}.weight"], config["rms_norm_eps"])

        h = h + _attention(norm(h, "input_layernorm"), linear, angles, config)
        x = norm(h, "post_attention_layernorm")
        gate = linear(x, "mlp.gate_proj")
        h = h + linear(gate / (1.0 + np.exp(-gate)) * linear(x, "mlp.up_proj"), "mlp.down_proj")
    return _rms_norm(h, weights["model.norm.weight"], config["rms_norm_eps"]) @ table.T


def _decode(layer: Any) -> Any:
    import mlx.core as mx

    floating = layer.scales.dtype != mx.uint8
    biases = layer.get("biases")
    return mx.dequantize(
        layer.weight,
        layer.scales.astype(mx.float32) if floating else layer.scales,
        None if biases is None else biases.astype(mx.float32),
        group_size=layer.group_size,
        bits=layer.bits,
        mode=layer.mode,
        dtype=mx.float32,
    )


def _attention(
    x: np.ndarray, linear: Callable[..., np.ndarray], angles: np.ndarray, config: dict[str, Any]
) -> np.ndarray:
    """Causal attention with grouped keys and values, [T, hidden] -> [T, hidden]."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    length = len(x)
    q, k, v = (
        linear(x, f"self_attn.{name}_proj").reshape(length, count, -1).transpose(1, 0, 2)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    )
    q, k = _rotate(q, angles), _rotate(k, angles)
    k, v = (np.repeat(value, heads // kv_heads, axis=0) for value in (k, v))
    scores = q @ k.transpose(0, 2, 1) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = scores / scores.sum(axis=-1, keepdims=True) @ v
    return linear(mixed.transpose(1, 0, 2).reshape(length, -1), "self_attn.o_proj")


def _rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + epsilon) * weight


def _rope_angles(length: int, config: dict[str, Any]) -> np.ndarray:
    """[T, head_dim / 2]: position x base^(-2 i / head_dim)."""
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = float(config["rope_theta"]) ** (-np.arange(0, width, 2) / width)
    return np.arange(length)[:, None] * frequencies


def _rotate(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Rotates the pairs (i, i + head_dim / 2) of x [heads, T, head_dim]."""
    low, high = np.split(x, 2, axis=-1)
    cosine, sine = np.cos(angles), np.sin(angles)
    return np.concatenate([low * cosine - high * sine, low * sine + high * cosine], axis=-1)
