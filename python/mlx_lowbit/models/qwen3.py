"""Qwen3 (dense): model_type ``qwen3``, and the text decoder of Qwen3-ASR.

Parameter names are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope

from .. import ops

# From how many queries on attention is worth products of our own; below, calls cost more.
_QUERIES = 16
# Queries at a time, which bounds the scores held and skips keys that causality hides.
_BLOCK = 256

_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_FIXED = {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False}
# The three position rows of Qwen3-ASR's "mrope" are equal, which makes it the plain rotation.
_PLAIN_ROPE = (None, "default", "mrope")


@dataclass
class ModelArgs:
    """``config.json``; what is missing or null has the default of transformers' ``Qwen3Config``.

    Attributes:
        rope_scaling: None, or a dict as mlx-lm's ``initialize_rope`` takes it.
    """

    model_type: str = "qwen3"
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    vocab_size: int = 151936
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    use_sliding_window: bool = False
    attention_bias: bool = False

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """From ``config.json``, with rotary settings at the top or in ``rope_parameters``.

        Raises:
            ValueError: a value that does not fit, by name.
        """
        values = dict(config)
        rope = values.pop("rope_parameters", None)
        if rope is not None:
            if not isinstance(rope, dict):
                raise ValueError(f"rope_parameters: expected an object, got {rope!r}")
            values["rope_scaling"] = rope
            values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta"))
        names = {field.name for field in fields(cls)}
        return cls(**{k: v for k, v in values.items() if k in names and v is not None})

    def __post_init__(self) -> None:
        check_positive(self, _COUNTS, int)
        check_positive(self, ("rms_norm_eps", "rope_theta"), (int, float))
        for name, only in _FIXED.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name}: expected {only!r}, got {getattr(self, name)!r}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(
                f"tie_word_embeddings: expected true or false, got {self.tie_word_embeddings!r}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads: expected a divisor of {self.num_attention_heads} heads, "
                f"got {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim: expected an even number, got {self.head_dim}")
        if self.rope_scaling is not None:
            if not isinstance(self.rope_scaling, dict):
                raise ValueError(f"rope_scaling: expected an object, got {self.rope_scaling!r}")
            kind = self.rope_scaling.get("rope_type") or self.rope_scaling.get("type")
            if kind in _PLAIN_ROPE:
                self.rope_scaling = None


def check_positive(args: Any, names: Sequence[str], kind: type | tuple[type, ...]) -> None:
    """Refuses fields of a configuration that are no positive numbers of `kind`.

    Raises:
        ValueError: naming the first of them.
    """
    for name in names:
        value = getattr(args, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < float("inf"):
            what = "a positive integer" if kind is int else "a positive number"
            raise ValueError(f"{name}: expected {what}, got {value!r}")


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, cache: Any = None
) -> mx.array:
    """Scaled dot-product attention, by this package's dense products on a CPU.

    MLX's own runs on a reference BLAS there: measured on two cores with AMX, 400 causal queries on
    16 heads of 128 take 410 ms with it and 80 ms here; 1200 take 4.0 s and 0.5 s.

    Args:
        q: [B, heads, L, head_dim]; k, v: [B, kv_heads, S, head_dim], or as a quantized `cache`
            returns them.
        mask: None, "causal" (the last query sees the last key), or what MLX's attention takes.

    Returns:
        [B, heads, L, head_dim] in the dtype of q.
    """
    own = (
        mx.default_device().type == mx.cpu
        and ops.get_backend() != "mlx"
        and isinstance(k, mx.array)
        and q.shape[2] >= _QUERIES
        and (mask is None or (isinstance(mask, str) and mask == "causal"))
    )
    if not own:
        return scaled_dot_product_attention(q, k, v, cache=cache, scale=scale, mask=mask)
    batch, heads, length, dims = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    # Heads that share keys are rows of one product: [B, kv_heads, heads / kv_heads, L, head_dim].
    q = (q * scale).reshape(batch, kv_heads, -1, length, dims)
    blocks = []
    for begin in range(0, length, _BLOCK):
        end = min(begin + _BLOCK, length)
        seen, hidden = keys, None
        if mask is not None:
            seen = keys - length + end
            hidden = mx.arange(seen) > mx.arange(seen - end + begin, seen)[:, None]
        rows = [
            _attend(q[b, h, :, begin:end], k[b, h, :seen], v[b, h, :seen], hidden)
            for b in range(batch)
            for h in range(kv_heads)
        ]
        blocks.append(mx.stack(rows).reshape(batch, heads, end - begin, dims))
    return blocks[0] if len(blocks) == 1 else mx.concatenate(blocks, axis=2)


def _attend(q: mx.array, k: mx.array, v: mx.array, hidden: mx.array | None) -> mx.array:
    """q [G, L, D], k and v [S, D], hidden [L, S] or None -> [G, L, D]."""
    scores = ops.linear(q, k)
    if hidden is not None:
        scores = mx.where(hidden, mx.finfo(scores.dtype).min, scores)
    return ops.linear(mx.softmax(scores, axis=-1, precise=True), v.T)


class Attention(nn.Module):
    """Grouped-query attention with q and k normalized by head before they are rotated."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.scale = args.head_dim**-0.5
        dims = args.hidden_size
        self.q_proj = nn.Linear(dims, self.n_heads * args.head_dim, bias=False)
        self.k_proj = nn.Linear(dims, self.n_kv_heads * args.head_dim, bias=False)
        self.v_proj = nn.Linear(dims, self.n_kv_heads * args.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * args.head_dim, dims, bias=False)
        self.q_norm = nn.RMSNorm(args.head_dim, eps=args.rms_norm_eps)
        self.k_norm = nn.RMSNorm(args.head_dim, eps=args.rms_norm_eps)
        self.rope = initialize_rope(
            args.head_dim,
            args.rope_theta,
            False,
            args.rope_scaling,
            args.max_position_embeddings,
        )

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [B, L, hidden] -> [B, L, hidden]."""
        b, length, _ = x.shape
        q = self.q_norm(self.q_proj(x).reshape(b, length, self.n_heads, -1))
        k = self.k_norm(self.k_proj(x).reshape(b, length, self.n_kv_heads, -1))
        v = self.v_proj(x).reshape(b, length, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        offset = 0 if cache is None else cache.offset
        q = self.rope(q.transpose(0, 2, 1, 3), offset=offset)
        k = self.rope(k.transpose(0, 2, 1, 3), offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = attention(q, k, v, scale=self.scale, mask=mask, cache=cache)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(b, length, -1))


class MLP(nn.Module):
    """``down(silu(gate x) * up x)``."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., hidden] -> [..., hidden]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class TransformerBlock(nn.Module):
    """Attention and a feed-forward part, each added to what went in."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.self_attn = Attention(args)
        self.mlp = MLP(args)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [B, L, hidden] -> [B, L, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, blocks, last norm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [TransformerBlock(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self,
        inputs: mx.array | None,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """inputs [B, L], or input_embeddings [B, L, hidden] -> [B, L, hidden]."""
        x = self.embed(inputs) if input_embeddings is None else input_embeddings
        cache = [None] * len(self.layers) if cache is None else cache
        mask = create_attention_mask(x, cache[0])
        for layer, own in zip(self.layers, cache, strict=True):
            x = layer(x, mask, own)
        return self.norm(x)

    def embed(self, inputs: mx.array) -> mx.array:
        """inputs, integers [...] -> [..., hidden] in the dtype of the decoder."""
        # Tables without biases (mxfp8, nvfp4) are decoded to bfloat16, exactly, in any model.
        return self.embed_tokens(inputs).astype(self.norm.weight.dtype)

    def as_head(self, x: mx.array) -> mx.array:
        """x [..., hidden] by the tied embedding -> [..., vocab_size]."""
        table = self.embed_tokens
        # nn.Embedding's product is MLX's own; a quantized table has one of ours.
        return ops.linear(x, table.weight) if type(table) is nn.Embedding else table.as_linear(x)


class Model(nn.Module):
    """The language model, in mlx-lm's protocol."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Decoder(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

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
            input_embeddings: [B, L, hidden] in place of the rows of the embedding.
        """
        x = self.model(inputs, cache, input_embeddings)
        return self.lm_head(x) if "lm_head" in self else self.model.as_head(x)

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks, one cache each."""
        return self.model.layers

    def quant_predicate(self, path: str, module: nn.Module) -> bool:
        """Whether a module that can be quantized may be: all of them."""
        return True

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The tensors of this model: without a copy of a tied head and rotary tables."""
        tied = self.args.tie_word_embeddings
        return {
            name: value
            for name, value in weights.items()
            if not name.endswith(".rotary_emb.inv_freq")
            and not (tied and name.startswith("lm_head."))
        }
