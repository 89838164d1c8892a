"""Mistral: model_type ``mistral``, and the language model of Moxin-7B.

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

# Where null means "none", not "as usual".
_NULL_IS_A_VALUE = ("sliding_window",)
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


@dataclass
class ModelArgs:
    """``config.json``; what is missing has the default of transformers' ``MistralConfig``.

    Attributes:
        rms_norm_eps: 1e-6 unless the configuration says otherwise (Mistral's own files say 1e-5).
        head_dim: None stands for hidden_size / num_attention_heads.
        sliding_window: how many positions a token sees, its own included; None for all.
        rope_scaling: None, or a dict as mlx-lm's ``initialize_rope`` takes it.
    """

    model_type: str = "mistral"
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    vocab_size: int = 32000
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    sliding_window: int | None = 4096
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    bos_token_id: int = 1

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """From ``config.json``, with rotary settings at the top or in ``rope_parameters``.

        Raises:
            ValueError: a value that does not fit, by name.
        """
        names = {field.name for field in fields(cls)}
        values = dict(config)
        rope = values.pop("rope_parameters", None)
        if rope is not None:
            if not isinstance(rope, dict):
                raise ValueError(f"rope_parameters: expected an object, got {rope!r}")
            values["rope_scaling"] = rope
            values["rope_theta"] = rope.get("rope_theta", values.get("rope_theta"))
        return cls(
            **{
                name: value
                for name, value in values.items()
                if name in names and (value is not None or name in _NULL_IS_A_VALUE)
            }
        )

    def __post_init__(self) -> None:
        if self.head_dim is None:
            _positive(self, ("hidden_size", "num_attention_heads"), int)
            self.head_dim = self.hidden_size // self.num_attention_heads
        window = () if self.sliding_window is None else ("sliding_window",)
        _positive(self, (*_COUNTS, *window), int)
        _positive(self, ("rms_norm_eps", "rope_theta"), (int, float))
        if not isinstance(self.tie_word_embeddings, bool):
            raise ValueError(
                f"tie_word_embeddings: expected true or false, got {self.tie_word_embeddings!r}"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act: expected 'silu', got {self.hidden_act!r}")
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
            if kind in (None, "default"):
                self.rope_scaling = None


def _positive(args: ModelArgs, names: Sequence[str], kind: type | tuple[type, ...]) -> None:
    for name in names:
        value = getattr(args, name)
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < float("inf"):
            what = "a positive integer" if kind is int else "a positive number"
            raise ValueError(f"{name}: expected {what}, got {value!r}")


class Attention(nn.Module):
    """Grouped-query attention; each half of a head's dimensions is rotated with the other."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.scale = args.head_dim**-0.5
        dims = args.hidden_size
        self.q_proj = nn.Linear(dims, self.n_heads * args.head_dim, bias=False)
        self.k_proj = nn.Linear(dims, self.n_kv_heads * args.head_dim, bias=False)
        self.v_proj = nn.Linear(dims, self.n_kv_heads * args.head_dim, bias=False)
        self.o_proj = nn.Linear(self.n_heads * args.head_dim, dims, bias=False)
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
        q = self.q_proj(x).reshape(b, length, self.n_heads, -1).transpose(0, 2, 1, 3)
        k = self.k_proj(x).reshape(b, length, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        v = self.v_proj(x).reshape(b, length, self.n_kv_heads, -1).transpose(0, 2, 1, 3)
        offset = 0 if cache is None else cache.offset
        q, k = self.rope(q, offset=offset), self.rope(k, offset=offset)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
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


def attention_mask(x: mx.array, cache: Any, window: int | None) -> Any:
    """The mask for x [B, L, hidden] behind what `cache` holds, each token seeing `window`.

    The cache keeps all positions, so that it can be quantized and trimmed; the window is a matter
    of the mask, and of none while all positions lie within it.
    """
    if window is not None:
        # An array where a batch's sequences have offsets of their own.
        offset = 0 if cache is None else cache.offset
        fits = isinstance(offset, int) and offset + x.shape[1] <= window
        # A rotating cache holds no more than max_size positions anyway.
        if fits or (getattr(cache, "max_size", None) or window + 1) <= window:
            window = None
    return create_attention_mask(x, cache, window_size=window)


class Decoder(nn.Module):
    """Embedding, blocks, last norm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.sliding_window = args.sliding_window
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
        x = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        cache = [None] * len(self.layers) if cache is None else cache
        mask = attention_mask(x, cache[0], self.sliding_window)
        for layer, own in zip(self.layers, cache, strict=True):
            x = layer(x, mask, own)
        return self.norm(x)


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
        return self.lm_head(x) if "lm_head" in self else self.model.embed_tokens.as_linear(x)

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
