"""GLM4-MoE (GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7): model_type ``glm4_moe``.

Parameter names are those of the published checkpoints, except that the experts of a layer are
stacked, as in mlx-lm: ``model.layers.N.mlp.switch_mlp.{gate,up,down}_proj``, [experts, out, in].
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.activations import swiglu
from mlx_lm.models.base import create_attention_mask, scaled_dot_product_attention
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.models.switch_layers import SwitchGLU

from .. import ops
from ..checkpoint import TensorError

_KINDS = {"int": int, "float": (int, float), "bool": bool, "str": str}
_FIXED = {"hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_MAY_BE_ZERO = ("first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")


@dataclass
class ModelArgs:
    """``config.json``; what is missing or null has the default of GLM4-MoE's configuration.

    Attributes:
        rope_scaling: None, or a dict as mlx-lm's ``initialize_rope`` takes it.
        num_nextn_predict_layers: layers after the last one that predict further tokens (MTP); their
            tensors are dropped.
    """

    model_type: str = "glm4_moe"
    vocab_size: int = 151552
    hidden_size: int = 4096
    intermediate_size: int = 10944
    moe_intermediate_size: int = 1408
    num_hidden_layers: int = 46
    num_nextn_predict_layers: int = 1
    first_k_dense_replace: int = 1
    num_attention_heads: int = 96
    num_key_value_heads: int = 8
    head_dim: int = 128
    attention_bias: bool = False
    use_qk_norm: bool = False
    max_position_embeddings: int = 131072
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 0.5
    rope_scaling: dict | None = None
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    n_routed_experts: int = 128
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    hidden_act: str = "silu"
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """From ``config.json``, with rotary settings at the top or in ``rope_parameters``.

        Raises:
            ValueError: a value that does not fit, by name.
        """
        values, names = dict(config), {field.name for field in fields(cls)}
        rope = values.pop("rope_parameters", None)
        if rope is not None:
            if not isinstance(rope, dict):
                raise ValueError(f"rope_parameters: expected an object, got {rope!r}")
            values.update({k: v for k, v in rope.items() if k in names})
            values["rope_scaling"] = rope
        known = {k: v for k, v in values.items() if k in names and v is not None}
        return cls(**known)

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_value(field.name, field.type, getattr(self, field.name))
        for name, only in _FIXED.items():
            if getattr(self, name) != only:
                raise ValueError(f"{name}: expected {only!r}, got {getattr(self, name)!r}")
        if self.rope_scaling is not None:
            kind = self.rope_scaling.get("rope_type") or self.rope_scaling.get("type")
            if kind in (None, "default"):
                self.rope_scaling = None
        heads, experts = self.num_attention_heads, self.n_routed_experts
        choice = self.topk_group * (experts // self.n_group)
        fits = {
            "num_key_value_heads": (heads % self.num_key_value_heads == 0, f"a divisor of {heads}"),
            "partial_rotary_factor": (
                0 < self.rotary_dims <= self.head_dim and self.rotary_dims % 2 == 0,
                f"an even part of {self.head_dim} dimensions",
            ),
            "n_group": (experts % self.n_group == 0, f"a divisor of {experts} experts"),
            "topk_group": (self.topk_group <= self.n_group, f"at most {self.n_group} groups"),
            "num_experts_per_tok": (self.num_experts_per_tok <= choice, f"at most {choice}"),
        }
        for name, (holds, expected) in fits.items():
            _check(holds, f"{name}: expected {expected}", getattr(self, name))

    @property
    def rotary_dims(self) -> int:
        """The first dimensions of a head, which are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


def _check(holds: bool, expected: str, got: Any) -> None:
    if not holds:
        raise ValueError(f"{expected}, got {got!r}")


def _check_value(name: str, kind: str, value: Any) -> None:
    if kind == "dict | None":
        _check(value is None or isinstance(value, dict), f"{name}: expected an object", value)
        return
    fits = isinstance(value, _KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))
    if fits and kind == "int":
        fits = value > 0 or (value == 0 and name in _MAY_BE_ZERO)
    if fits and kind == "float":
        fits = 0 < value < float("inf")
    wanted = {"int": "a positive integer", "float": "a positive number"}.get(kind, f"a {kind}")
    _check(fits, f"{name}: expected {wanted}", value)


class Attention(nn.Module):
    """Grouped-query attention; q and k perhaps normalized, a part of each head rotated."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.heads, self.kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.scale = args.head_dim**-0.5
        dims, bias = args.hidden_size, args.attention_bias
        self.q_proj = nn.Linear(dims, self.heads * args.head_dim, bias=bias)
        self.k_proj = nn.Linear(dims, self.kv_heads * args.head_dim, bias=bias)
        self.v_proj = nn.Linear(dims, self.kv_heads * args.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.heads * args.head_dim, dims, bias=False)
        self.use_qk_norm = args.use_qk_norm
        if args.use_qk_norm:
            self.q_norm = nn.RMSNorm(args.head_dim, eps=args.rms_norm_eps)
            self.k_norm = nn.RMSNorm(args.head_dim, eps=args.rms_norm_eps)
        self.rope = initialize_rope(
            args.rotary_dims,
            args.rope_theta,
            False,
            args.rope_scaling,
            args.max_position_embeddings,
        )

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [B, L, hidden] -> [B, L, hidden]."""
        b, length, _ = x.shape
        q = self.q_proj(x).reshape(b, length, self.heads, -1)
        k, v = (p(x).reshape(b, length, self.kv_heads, -1) for p in (self.k_proj, self.v_proj))
        if self.use_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        offset = 0 if cache is None else cache.offset
        q = self.rope(q.transpose(0, 2, 1, 3), offset=offset)
        k, v = self.rope(k.transpose(0, 2, 1, 3), offset=offset), v.transpose(0, 2, 1, 3)
        if cache is not None:
            k, v = cache.update_and_fetch(k, v)
        y = scaled_dot_product_attention(q, k, v, cache=cache, scale=self.scale, mask=mask)
        return self.o_proj(y.transpose(0, 2, 1, 3).reshape(b, length, -1))


class MLP(nn.Module):
    """``down(silu(gate x) * up x)``."""

    def __init__(self, dims: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dims, hidden, bias=False)
        self.up_proj = nn.Linear(dims, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., dims] -> [..., dims]."""
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


@mx.compile
def choose_experts(
    logits: mx.array,
    correction: mx.array,
    top: int,
    groups: int,
    kept_groups: int,
    normalize: bool,
    factor: float,
) -> tuple[mx.array, mx.array]:
    """logits float32 [..., E] -> indices uint32 and weights float32, both [..., top].

    Experts are chosen by sigmoid plus `correction`, from the groups whose two best experts have the
    largest sum; they are weighted by the sigmoid alone.
    """
    scores = mx.sigmoid(logits)
    ranks = scores + correction
    if kept_groups < groups:
        ranks = mx.unflatten(ranks, -1, (groups, -1))
        best = mx.topk(ranks, min(2, ranks.shape[-1]), axis=-1).sum(axis=-1)
        out = mx.argpartition(best, kth=groups - kept_groups - 1, axis=-1)
        out = out[..., : groups - kept_groups, None]
        # Not 0, which is above a rank that a negative correction made: a rejected expert would win.
        ranks = mx.put_along_axis(ranks, out, mx.array(-mx.inf), axis=-2)
        ranks = mx.flatten(ranks, -2, -1)
    indices = mx.stop_gradient(mx.argpartition(-ranks, kth=top - 1, axis=-1)[..., :top])
    weights = mx.take_along_axis(scores, indices, axis=-1)
    if normalize:
        weights = weights / (weights.sum(axis=-1, keepdims=True) + 1e-20)
    return indices, weights * factor


class Router(nn.Module):
    """The choice of experts, in float32 whatever the dtype of the model; never quantized."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.weight = mx.zeros((args.n_routed_experts, args.hidden_size))
        self.e_score_correction_bias = mx.zeros((args.n_routed_experts,))
        self._settings = (
            args.num_experts_per_tok,
            args.n_group,
            args.topk_group,
            args.norm_topk_prob,
            args.routed_scaling_factor,
        )

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [..., hidden] -> indices and weights [..., top]: :func:`choose_experts`."""
        # In the dtype of a bfloat16 model, near ties would choose other experts.
        logits = ops.linear(x.astype(mx.float32), self.weight.astype(mx.float32))
        correction = self.e_score_correction_bias.astype(mx.float32)
        return choose_experts(logits, correction, *self._settings)


class MoE(nn.Module):
    """Routed experts plus those that every token takes."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate = Router(args)
        dims, hidden = args.hidden_size, args.moe_intermediate_size
        self.switch_mlp = SwitchGLU(dims, hidden, args.n_routed_experts)
        if args.n_shared_experts:
            self.shared_experts = MLP(dims, hidden * args.n_shared_experts)

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, hidden] -> [B, L, hidden]."""
        indices, weights = self.gate(x)
        y = self.switch_mlp(x, indices)
        y = (y * weights[..., None]).sum(axis=-2).astype(x.dtype)
        return y + self.shared_experts(x) if "shared_experts" in self else y


class DecoderLayer(nn.Module):
    """Attention and a feed-forward part, each added to what went in."""

    def __init__(self, args: ModelArgs, index: int) -> None:
        super().__init__()
        dims, eps = args.hidden_size, args.rms_norm_eps
        dense = index < args.first_k_dense_replace
        self.self_attn = Attention(args)
        self.mlp = MLP(dims, args.intermediate_size) if dense else MoE(args)
        self.input_layernorm = nn.RMSNorm(dims, eps=eps)
        self.post_attention_layernorm = nn.RMSNorm(dims, eps=eps)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """x [B, L, hidden] -> [B, L, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args, index) for index in range(args.num_hidden_layers)]
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
        mask = create_attention_mask(x, cache[0])
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
        """inputs, integers [B, L] -> logits [B, L, vocab_size]."""
        x = self.model(inputs, cache, input_embeddings)
        return self.lm_head(x) if "lm_head" in self else self.model.embed_tokens.as_linear(x)

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers, one cache each."""
        return self.model.layers

    def cast_predicate(self, path: str) -> bool:
        """Whether the parameter at `path` may be cast to the dtype of the model."""
        return not path.endswith("e_score_correction_bias")

    def quant_predicate(self, path: str, module: nn.Module) -> bool:
        """Whether a module that can be quantized may be: all of them, the router is none."""
        return True

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Tensors of any published layout, under the names of this model.

        Experts one by one (``experts.E.gate_proj.weight``, quantized or not), fused as transformers
        holds them (``experts.gate_up_proj`` [E, 2 I, H]), or stacked. Layers for further tokens
        (MTP) and a copy of a tied head are dropped.

        Raises:
            TensorError: an expert that is missing, one too many, or of another shape.
        """
        kept: dict[str, mx.array] = {}
        single: dict[str, dict[int, tuple[str, mx.array]]] = {}
        first = self.args.num_hidden_layers
        dropped = range(first, first + self.args.num_nextn_predict_layers)
        for name, value in weights.items():
            layer = _LAYER.match(name)
            if layer is not None and int(layer[1]) in dropped:
                continue
            if name.endswith(".rotary_emb.inv_freq"):
                continue
            if self.args.tie_word_embeddings and name.startswith("lm_head."):
                continue
            if (own := _EXPERT.fullmatch(name)) is not None:
                stack = f"{own[1]}.switch_mlp.{own[3]}"
                single.setdefault(stack, {})[int(own[2])] = (name, value)
            elif (fused := _FUSED.fullmatch(name)) is not None and value.ndim == 3:
                prefix = f"{fused[1]}.switch_mlp"
                if fused[2] == "down_proj":
                    kept[f"{prefix}.down_proj.weight"] = value
                else:
                    gate, up = mx.split(value, 2, axis=1)
                    kept[f"{prefix}.gate_proj.weight"] = gate
                    kept[f"{prefix}.up_proj.weight"] = up
            else:
                kept[name] = value
        for stack, experts in single.items():
            kept[stack] = _stacked(stack, experts, self.args.n_routed_experts)
        return kept


_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(
    r"(.+\.mlp)\.experts\.(\d+)\.((?:gate|up|down)_proj\.(?:weight|scales|biases))"
)
_FUSED = re.compile(r"(.+\.mlp)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?")


def _stacked(stack: str, experts: dict[int, tuple[str, mx.array]], count: int) -> mx.array:
    some, (name, like) = next(iter(experts.items()))
    for index in range(count):
        if index not in experts:
            missing = name.replace(f".experts.{some}.", f".experts.{index}.")
            raise TensorError(missing, f"missing; {stack} has {len(experts)} of {count} experts")
        own, value = experts[index]
        if (value.shape, value.dtype) != (like.shape, like.dtype):
            got = f"{value.dtype} {list(value.shape)}"
            raise TensorError(own, f"expected {like.dtype} {list(like.shape)} as {name}, got {got}")
    if len(experts) > count:
        extra = next(own for index, (own, _) in experts.items() if index >= count)
        raise TensorError(extra, f"n_routed_experts is {count}")
    return mx.stack([experts[index][1] for index in range(count)])
