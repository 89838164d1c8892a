"""GLM4-MoE against transformers: routers, experts and whole models, weights and x quantized."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import assume, given
from hypothesis import strategies as st
from mixture_values import (
    SMALL,
    Mixture,
    TransformersRouter,
    assert_within,
    choose,
    margin,
    mlx_lm_model,
    output,
    quantized_layers,
    run_and_see,
    transformers_model,
    with_decoded_weights,
)
from mlx_lowbit import accelerate, quantize_activations
from mlx_lowbit.formats import FORMATS

pytest.importorskip("mlx_lm")
pytest.importorskip("torch")
pytest.importorskip("transformers")

# So many choices of experts, and mlx-lm sorts the rows by expert.
SORTED_FROM = 64
STORED = [f for f in FORMATS if f.judged and (f.group_size == 64 or not f.has_biases)]
NEGATIVE = (-1.5, -1.2)  # corrected scores are all below zero


@st.composite
def configurations(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[float, float]]:
    """Settings of one layer, and the range of its correction biases."""
    groups, each = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([2, 4, 5]))
    kept = draw(st.integers(1, groups))
    settings = {
        "hidden_size": draw(st.sampled_from([64, 128, 192])),
        "moe_intermediate_size": draw(st.sampled_from([64, 128])),
        "n_routed_experts": groups * each,
        "n_shared_experts": draw(st.integers(1, 2)),
        "n_group": groups,
        "topk_group": kept,
        "num_experts_per_tok": draw(st.integers(1, min(8, kept * each))),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5, 0.7])),
    }
    return settings, draw(st.sampled_from([(0.0, 0.0), (0.0, 1.0), NEGATIVE]))


def mlx_lm_chooses_alike(settings: dict[str, Any], correction: tuple[float, float]) -> bool:
    rejects = settings["topk_group"] < settings["n_group"]
    one = settings["num_experts_per_tok"] == 1 and settings["norm_topk_prob"]
    return not one and not (rejects and correction[0] < 0)


def quantize(model: mlx_nn.Module, fmt: Any) -> None:
    """All but the embedding, which would be decoded to bfloat16 in some modes."""
    mlx_nn.quantize(
        model,
        **strategies.format_keywords(fmt),
        class_predicate=lambda _, layer: (
            hasattr(layer, "to_quantized") and not isinstance(layer, mlx_nn.Embedding)
        ),
    )


def check_block(data: st.DataObject, fmt: Any, dtype: mx.Dtype, order: str, qq: bool) -> None:
    settings, correction = data.draw(configurations())
    seed, top = data.draw(strategies.seeds), settings["num_experts_per_tok"]
    few = -(-SORTED_FROM // top)
    tokens = data.draw(
        st.integers(few, few + 9) if order == "sorted" else st.integers(1, min(12, few - 1))
    )
    theirs = transformers_model(settings, correction, seed=seed)
    x = strategies.activations(
        np.random.default_rng(seed), (tokens, settings["hidden_size"]), dtype
    )
    exact = theirs.model.layers[0].mlp
    assume(margin(exact.gate, x.astype(np.float32)) > 1e-4)

    model = mlx_lm_model(theirs, settings)
    model.set_dtype(dtype)
    quantize(model, fmt)
    if qq:
        quantize_activations(model)
    accelerate(model, merge=data.draw(st.booleans(), label="merge"))
    block, relative = model.model.layers[0].mlp, 0.0
    kind = "QQSwitchLinear" if qq else "QuantizedSwitchLinear"
    assert type(block.switch_mlp.up_proj).__name__ == kind
    indices, weights = choose(exact.gate, x.astype(np.float32))
    reference, known, seen = Mixture(block, dtype, fmt if qq else None), oracle.f64(x), None
    own = not qq and dtype == mx.float32 and mlx_lm_chooses_alike(settings, correction)
    if own and data.draw(st.booleans(), label="mlx-lm's router"):
        # Two float32 sums each; a sigmoid's relative slope is below 1, and so is that of a share.
        worst = np.abs(x) @ np.abs(exact.gate.weight.numpy()).T
        relative = 4 * (x.shape[-1] + 8) * 2.0**-24 * float(worst.max()) + 2.0**-20
        y = block(oracle.to_mlx(x)[None])[0]
    else:
        block.gate = TransformersRouter(exact.gate)
        y, seen = run_and_see(block, oracle.to_mlx(x), indices)
    assert y.dtype == dtype
    if not qq:  # the reference is transformers' mixture with the decoded weights
        twin = with_decoded_weights(theirs, model).model.layers[0].mlp
        want, got = output(twin, known[None])[0], reference(known, indices, weights).value
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-9 * np.abs(want).max())
    assert_within(y, reference(known, indices, weights, relative, seen))


@pytest.mark.parametrize("order", ["as they come", "sorted"])
@pytest.mark.parametrize("stored", STORED, ids=lambda f: f.name)
@given(data=st.data())
def test_experts(stored, dtype, order, data):
    check_block(data, stored, dtype, order, qq=False)


@pytest.mark.parametrize("order", ["as they come", "sorted"])
@given(data=st.data())
def test_experts_with_quantized_activations(qq_fmt, dtype, order, data):
    check_block(data, qq_fmt, dtype, order, qq=True)


# --- whole models -------------------------------------------------------------------------------

# Settings, range of the correction biases, rotary part of a head.
MODELS = {
    "as GLM-4.5-Air": ({"num_hidden_layers": 3, "first_k_dense_replace": 1}, (-0.1, 0.1), 0.5),
    "as GLM-4.5": (
        {
            "num_hidden_layers": 3,
            "first_k_dense_replace": 2,
            "use_qk_norm": True,
            "routed_scaling_factor": 2.5,
            "n_routed_experts": 12,
            "num_experts_per_tok": 4,
        },
        (-0.1, 0.1),
        0.5,
    ),
    "groups": (
        {
            "num_hidden_layers": 2,
            "n_group": 4,
            "topk_group": 2,
            "n_routed_experts": 16,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "attention_bias": False,
        },
        (0.0, 0.5),
        0.25,
    ),
    "rejected groups below zero": (
        {
            "num_hidden_layers": 2,
            "n_group": 4,
            "topk_group": 1,
            "n_routed_experts": 16,
            "routed_scaling_factor": 1.7,
        },
        NEGATIVE,
        1.0,
    ),
    "one expert": (
        {"num_hidden_layers": 2, "num_experts_per_tok": 1, "use_qk_norm": True},
        (0.0, 0.2),
        0.5,
    ),
}


def whole(name: str) -> tuple[Any, mlx_nn.Module, np.ndarray]:
    """transformers' model, mlx-lm's with the same weights, and tokens [1, 40]."""
    settings, correction, rotary = MODELS[name]
    theirs = transformers_model(settings, correction, rotary, seed=5)
    model = mlx_lm_model(theirs, settings, rotary)
    if not mlx_lm_chooses_alike({**SMALL, **settings}, correction):
        for block, exact in zip(model.layers, theirs.model.layers, strict=True):
            block.mlp.gate = TransformersRouter(exact.mlp.gate)
    return theirs, model, np.random.default_rng(3).integers(0, SMALL["vocab_size"], (1, 40))


def logits(model: mlx_nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Those of all tokens: most of them at once, the last three one by one."""
    from mlx_lm.models.cache import make_prompt_cache

    cache, parts = make_prompt_cache(model), np.split(tokens, [37, 38, 39], axis=1)
    return np.concatenate(
        [oracle.f64(model(mx.array(part), cache=cache)) for part in parts], axis=1
    )


def assert_as_exact(model: mlx_nn.Module, twin: Any, tokens: np.ndarray) -> None:
    """Four times what transformers' own float32 is off, and a float32 product's bound for each of
    the six products that follow each other in a layer."""
    exact, got = output(twin, tokens), logits(model, tokens)
    plain = output(twin.float(), tokens)
    products = 6 * len(model.layers) + 1
    bound = 4 * np.linalg.norm(plain - exact)
    bound += products * oracle.tolerance(mx.float32, 192) * np.linalg.norm(exact)
    assert bound < 1e-3 * np.linalg.norm(exact)
    assert np.linalg.norm(got - exact) <= bound


@pytest.mark.parametrize("name", MODELS)
def test_unquantized_models(name):
    theirs, model, tokens = whole(name)
    assert_as_exact(model, with_decoded_weights(theirs, model), tokens)
    accelerate(model)
    assert_as_exact(model, with_decoded_weights(theirs, model), tokens)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("stored", STORED, ids=lambda f: f.name)
@pytest.mark.parametrize("name", MODELS)
def test_quantized_models(name, stored, merge):
    theirs, model, tokens = whole(name)
    quantize(model, stored)
    report = accelerate(model, merge=merge)
    assert report.left == [] and len(report.replaced) == len(quantized_layers(model))
    of_experts = [path for path, _, _ in report.merged if path.endswith("switch_mlp")]
    mixtures = len(model.layers) - model.args.first_k_dense_replace
    assert len(of_experts) == (mixtures if merge else 0)
    assert_as_exact(model, with_decoded_weights(theirs, model), tokens)


def test_a_rejected_group_below_zero_is_where_mlx_lm_differs():
    """Should this fail, mlx-lm has learned it, and the models above need no other router."""
    settings, correction, _ = MODELS["rejected groups below zero"]
    theirs = transformers_model(settings, correction, seed=5)
    x = np.random.default_rng(0).standard_normal((16, SMALL["hidden_size"])).astype(np.float32)
    router = theirs.model.layers[0].mlp.gate
    indices, _ = mlx_lm_model(theirs, settings).layers[0].mlp.gate(mx.array(x))
    assert not np.array_equal(np.sort(np.array(indices)), np.sort(choose(router, x)[0]))
