"""GLM4-MoE as transformers computes it, the same weights in mlx-lm's model, and a float64 mixture
that carries along how far rounding may take each of its values."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import oracle
from layer_values import decoded

SMALL = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 192,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "attention_bias": True,
    "use_qk_norm": False,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "max_position_embeddings": 256,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
}
ROPE_THETA = 1e6  # the published one, which no default is


# --- the two models ---------------------------------------------------------------------------


def transformers_model(
    settings: dict[str, Any], correction: tuple[float, float], rotary: float = 0.5, seed: int = 0
) -> Any:
    """transformers' model in float32 with random weights of every kind.

    Args:
        correction: the range of the router's correction biases.
        rotary: the part of a head's dimensions that is rotated.
    """
    import torch
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    config = Glm4MoeConfig(
        **{**SMALL, **settings},
        rope_parameters={
            "rope_type": "default",
            "rope_theta": ROPE_THETA,
            "partial_rotary_factor": rotary,
        },
        pad_token_id=None,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    model = Glm4MoeForCausalLM(config).eval().requires_grad_(False)
    torch.manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("e_score_correction_bias"):
            value.uniform_(*correction)
        elif value.ndim == 1:
            value.copy_(torch.randn(value.shape) * 0.1 + (0 if name.endswith("bias") else 1))
        else:
            value.copy_(torch.randn(value.shape) / value.shape[-1] ** 0.5)
    return model


def published(model: Any) -> dict[str, mx.array]:
    """Its weights under the names of published files, which hold every expert apart."""
    weights = {}
    for name, value in model.state_dict().items():
        array = mx.array(value.numpy())
        prefix, experts, last = name.partition(".experts.")
        if not experts:
            weights[name] = array
            continue
        for e in range(array.shape[0]):
            parts = {"down_proj": array[e]}
            if last == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), array[e].split(2, axis=0), strict=True))
            weights |= {f"{prefix}.experts.{e}.{part}.weight": w for part, w in parts.items()}
    return weights


class TransformersRouter(mlx_nn.Module):
    """transformers' choice of experts in place of mlx-lm's.

    mlx-lm 0.32 computes logits in the dtype of x, gives the experts of rejected groups a score of 0
    instead of -inf, and does not normalize where one expert is chosen.
    """

    def __init__(self, router: Any) -> None:
        super().__init__()
        self.router = router

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [..., dims] -> indices uint32 and weights float32 [..., top]."""
        indices, weights = choose(self.router, np.array(x.astype(mx.float32)))
        return mx.array(indices), mx.array(weights)


def choose(router: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices uint32, weights float32), both [..., top], for x [..., dims] in float32."""
    import torch

    with torch.no_grad():
        _, weights, indices = router(torch.from_numpy(x))
    shape = (*x.shape[:-1], -1)
    return indices.numpy().astype(np.uint32).reshape(shape), weights.numpy().reshape(shape)


def margin(router: Any, x: np.ndarray) -> float:
    """By how little the closest choice among groups or experts was made, x [tokens, dims]."""
    import torch

    with torch.no_grad():
        scores = torch.sigmoid(router(torch.from_numpy(x))[0]).numpy()
    scores = (scores + router.e_score_correction_bias.numpy()).reshape(len(x), router.num_group, -1)
    groups = np.sort(scores)[..., -2:].sum(-1)
    least = np.sort(groups)[:, -router.topk_group, None]
    experts = np.where((groups >= least)[..., None], scores, -np.inf).reshape(len(x), -1)
    gaps = [np.inf]
    for each, chosen in ((groups, router.topk_group), (experts, router.top_k)):
        if chosen < each.shape[1]:
            ordered = np.sort(each)[:, ::-1]
            gaps.append(float((ordered[:, chosen - 1] - ordered[:, chosen]).min()))
    return min(gaps)


def mlx_lm_model(model: Any, settings: dict[str, Any], rotary: float = 0.5) -> mlx_nn.Module:
    """mlx-lm's model with the weights of transformers' ``model``, through its own ``sanitize``."""
    from mlx_lm.models import glm4_moe

    args = glm4_moe.ModelArgs(
        model_type="glm4_moe",
        **{**SMALL, **settings},
        rope_theta=ROPE_THETA,
        rope_scaling=None,
        partial_rotary_factor=rotary,
    )
    new = glm4_moe.Model(args)
    new.load_weights(list(new.sanitize(published(model)).items()))
    return new.eval()


def quantized_layers(model: mlx_nn.Module) -> dict[str, mlx_nn.Module]:
    """Its quantized linear and switch layers by path."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if "scales" in layer and not isinstance(layer, mlx_nn.QuantizedEmbedding)
    }


def with_decoded_weights(model: Any, quantized: mlx_nn.Module) -> Any:
    """A float64 copy of transformers' ``model`` with the weights that ``quantized`` stands for."""
    import torch

    twin = copy.deepcopy(model).double()
    state = twin.state_dict()
    for path, layer in quantized_layers(quantized).items():
        value = torch.from_numpy(decoded(layer))
        prefix, experts, name = path.partition(".switch_mlp.")
        if not experts:
            state[f"{path}.weight"].copy_(value)
        elif name == "down_proj":
            state[f"{prefix}.experts.down_proj"].copy_(value)
        else:
            halves = state[f"{prefix}.experts.gate_up_proj"].chunk(2, dim=1)
            halves[("gate_proj", "up_proj").index(name)].copy_(value)
    return twin


def output(module: Any, x: np.ndarray) -> np.ndarray:
    """What a module or model of transformers makes of x, in float64."""
    import torch

    with torch.no_grad():
        y = module(torch.from_numpy(x))
    return getattr(y, "logits", y).double().numpy()


# --- the mixture with its rounding ------------------------------------------------------------


class Rounded(NamedTuple):
    """Exact values, and the root mean square of what rounding may do to each of them."""

    value: np.ndarray
    error: np.ndarray


class Seen(NamedTuple):
    """What entered the last projections of a block: of experts [tokens, top, dims], shared."""

    experts: np.ndarray
    shared: np.ndarray


def run_and_see(block: mlx_nn.Module, x: mx.array, indices: np.ndarray) -> tuple[mx.array, Seen]:
    """The block's result for x [tokens, dims], whose router chooses ``indices`` in this order."""
    rows: list[mx.array] = []
    owners = (block.switch_mlp, block.shared_experts)
    layers = [owner.down_proj for owner in owners]
    for owner, layer in zip(owners, layers, strict=True):
        owner.down_proj = lambda h, *more, own=layer, **named: (
            rows.append(h),
            own(h, *more, **named),
        )[1]
    y = block(x[None])[0]
    for owner, layer in zip(owners, layers, strict=True):
        owner.down_proj = layer
    experts, shared = (oracle.f64(h) for h in rows)
    experts = experts.reshape(indices.size, -1)
    if rows[0].ndim == 3:  # sorted by expert
        order = np.array(mx.argsort(mx.array(indices).flatten()))
        experts = experts[np.argsort(order)]
    return y, Seen(experts.reshape(*indices.shape, -1), shared[0])


class Mixture:
    """A block of experts with the weights that ``block`` (mlx-lm's MoE, quantized) stands for.

    Errors are those that the package allows a product (``oracle.tolerance``), and single roundings
    elsewhere, taken as independent of each other.

    Args:
        activations: the format that x is quantized in before each product, or None.
    """

    def __init__(self, block: mlx_nn.Module, dtype: mx.Dtype, activations: Any = None) -> None:
        self.weights = {path: decoded(layer) for path, layer in quantized_layers(block).items()}
        self.dtype, self.activations = dtype, activations
        self.unit = oracle.ROUNDOFF[dtype]

    def taken(self, x: Rounded) -> Rounded:
        """x as products see it. One that is not exactly known could take either side of a tie."""
        if self.activations is None:
            return x
        assert not x.error.any()
        stored = x.value.astype(np.float32).astype(oracle.NUMPY_DTYPE[self.dtype])
        value = oracle.decode(self.activations, oracle.encode(self.activations, stored))
        return Rounded(value, x.error)

    def product(self, x: Rounded, weight: np.ndarray) -> Rounded:
        """taken(x) @ weight^T."""
        x = self.taken(x)
        exact = oracle.matmul(x.value, weight)
        own = oracle.tolerance(self.dtype, weight.shape[-1])
        own = own * np.maximum(np.abs(exact.value), exact.rms) + oracle.UNDERFLOW[self.dtype]
        return Rounded(exact.value, np.hypot(own, np.sqrt(x.error**2 @ weight.T**2)))

    def feed_forward(
        self, x: np.ndarray, weights: list[np.ndarray], seen: np.ndarray | None
    ) -> Rounded:
        """down(silu(gate x) * (up x)) for [gate, up, down]; the slope of silu is below 1.1.

        ``seen``: the product within, which is judged here and then taken for exact.
        """
        gate, up, down = weights
        a, b = (self.product(Rounded(x, np.zeros_like(x)), w) for w in (gate, up))
        silu = a.value / (1 + np.exp(-a.value))
        own = 8 * self.unit * np.abs(silu * b.value) + oracle.UNDERFLOW[self.dtype]
        error = np.sqrt((1.1 * a.error * b.value) ** 2 + (silu * b.error) ** 2 + own**2)
        inner = Rounded(silu * b.value, error)
        if seen is not None:
            assert_within(seen, inner)
            inner = Rounded(seen, np.zeros_like(seen))
        return self.product(inner, down)

    def __call__(
        self,
        x: np.ndarray,
        indices: np.ndarray,
        weights: np.ndarray,
        relative: float = 0.0,
        seen: Seen | None = None,
    ) -> Rounded:
        """The block's result for x [tokens, dims].

        Args:
            indices, weights: [tokens, top]; ``relative``: the error of the weights.
        """
        names = ("gate_proj", "up_proj", "down_proj")
        stacks = [self.weights[f"switch_mlp.{name}"] for name in names]
        value, squares, sizes = (np.zeros(x.shape) for _ in range(3))
        for e in np.unique(indices):
            token, slot = np.nonzero(indices == e)
            inner = None if seen is None else seen.experts[token, slot]
            y = self.feed_forward(x[token], [stack[e] for stack in stacks], inner)
            share = weights[token, slot, None].astype(np.float64)
            np.add.at(value, token, share * y.value)
            np.add.at(sizes, token, np.abs(share * y.value))
            np.add.at(squares, token, (share * y.error) ** 2)
        shared = self.feed_forward(
            x,
            [self.weights[f"shared_experts.{name}"] for name in names],
            None if seen is None else seen.shared,
        )
        sums = (relative + (indices.shape[1] + 2) * 2.0**-24) * sizes
        total = value + shared.value
        own = self.unit * np.abs(value) + self.unit * np.abs(total) + oracle.UNDERFLOW[self.dtype]
        return Rounded(total, np.sqrt(squares + shared.error**2 + sums**2 + own**2))


def assert_within(y: Any, expected: Rounded) -> None:
    """Every row of y [rows, dims] within its bound, as a vector."""
    assert y.shape == expected.value.shape
    error = np.linalg.norm(oracle.f64(y) - expected.value, axis=-1)
    bound = np.linalg.norm(expected.error, axis=-1)
    over = np.flatnonzero(~(error <= bound))
    if len(over):
        row = over[0]
        raise AssertionError(
            f"{len(over)} of {len(error)} rows are out; row {row}: error {error[row]:.3g}, bound "
            f"{bound[row]:.3g}, size {np.linalg.norm(expected.value[row]):.3g}"
        )
