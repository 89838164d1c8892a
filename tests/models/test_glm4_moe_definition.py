"""This package's GLM4-MoE against transformers and mlx-lm: logits, tokens, layouts, the router."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
from checkpoint_values import (
    BIAS,
    CONFIG,
    ROUTER,
    assert_same,
    config,
    fused,
    new_model,
    parameters,
    published,
)
from mixture_values import (
    ROPE_THETA,
    SMALL,
    choose,
    output,
    transformers_model,
    with_decoded_weights,
)
from mixture_values import published as published_by_transformers
from mlx_lowbit import accelerate, models
from mlx_lowbit.checkpoint import TensorError
from test_glm4_moe import MODELS, STORED, logits, quantize

pytest.importorskip("mlx_lm")
TOLERANCE = 2e-5
GREEDY = 64


def ours(theirs: Any, name: str) -> mlx_nn.Module:
    """Our model with the weights of transformers' in its published layout."""
    settings, _, rotary = MODELS[name]
    full = {**SMALL, **settings, "model_type": "glm4_moe", "rope_theta": ROPE_THETA}
    module = models.module_for(full)
    assert module.__name__ == "mlx_lowbit.models.glm4_moe"
    model = module.Model(module.ModelArgs.from_dict({**full, "partial_rotary_factor": rotary}))
    model.load_weights(list(model.sanitize(published_by_transformers(theirs)).items()))
    return model.eval()


def both(name: str) -> tuple[Any, mlx_nn.Module, np.ndarray]:
    # Small products; a second thread would only contend with the kernels.
    pytest.importorskip("torch").set_num_threads(1)
    pytest.importorskip("transformers")
    settings, correction, rotary = MODELS[name]
    theirs = transformers_model(settings, correction, rotary, seed=5)
    tokens = np.random.default_rng(3).integers(0, SMALL["vocab_size"], (1, 40))
    return theirs, ours(theirs, name), tokens


def greedy(model: mlx_nn.Module, tokens: np.ndarray) -> list[int]:
    from mlx_lm.generate import generate_step

    steps = generate_step(mx.array(tokens[0]), model, max_tokens=GREEDY)
    return [int(token) for token, _ in steps]


def greedy_of_transformers(model: Any, tokens: np.ndarray) -> list[int]:
    import torch

    found = model.generate(
        torch.from_numpy(tokens), max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False
    )
    return found[0, tokens.shape[1] :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
    theirs, model, tokens = both(name)
    want = output(theirs, tokens)
    for _ in range(2):
        np.testing.assert_allclose(np.array(model(mx.array(tokens))), want, atol=TOLERANCE, rtol=0)
        # most tokens at once, the last ones with a cache, one by one
        np.testing.assert_allclose(logits(model, tokens), want, atol=TOLERANCE, rtol=0)
        accelerate(model)


@pytest.mark.parametrize("stored", STORED, ids=lambda f: f.name)
@pytest.mark.parametrize("name", MODELS)
def test_logits_of_quantized_models(name, stored):
    theirs, model, tokens = both(name)
    quantize(model, stored)
    accelerate(model)
    want = output(with_decoded_weights(theirs, model), tokens)
    np.testing.assert_allclose(logits(model, tokens), want, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("stored", [None, *STORED], ids=lambda f: getattr(f, "name", "float32"))
def test_greedy_tokens(stored):
    theirs, model, tokens = both("as GLM-4.5")
    if stored is not None:
        quantize(model, stored)
        theirs = with_decoded_weights(theirs, model).float()
    accelerate(model)
    assert greedy(model, tokens) == greedy_of_transformers(theirs, tokens)


def test_logits_of_mlx_lm():
    from mlx_lm.models import glm4_moe

    model = new_model(config(use_qk_norm=True))
    theirs = glm4_moe.Model(glm4_moe.ModelArgs.from_dict(config(use_qk_norm=True)))
    theirs.load_weights(list(parameters(model).items()))
    for each in (model, theirs):
        each.set_dtype(mx.float32)
    tokens = mx.array([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert mx.abs(model(tokens) - theirs(tokens)).max().item() < TOLERANCE


# --- the router ---------------------------------------------------------------------------------


def routers(dtype: mx.Dtype, correction: tuple[float, float], **settings: Any) -> tuple[Any, Any]:
    """(ours, transformers') with the same weights, those of ours in `dtype`."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from mlx_lowbit.models import glm4_moe

    theirs = transformers_model(settings, correction, seed=5).model.layers[0].mlp.gate
    router = glm4_moe.Router(glm4_moe.ModelArgs.from_dict({**SMALL, **settings}))
    router.weight = mx.array(theirs.weight.numpy()).astype(dtype)
    router.e_score_correction_bias = mx.array(theirs.e_score_correction_bias.numpy())
    theirs.weight.copy_(type(theirs.weight.data)(np.array(router.weight.astype(mx.float32))))
    return router, theirs


def by_expert(indices: np.ndarray, weights: np.ndarray, experts: int) -> np.ndarray:
    """Weights [rows, experts], 0 where an expert was not chosen."""
    dense = np.zeros((len(indices), experts), np.float32)
    np.put_along_axis(dense, indices.astype(np.int64), weights, axis=-1)
    return dense


@pytest.mark.parametrize(
    ("correction", "settings"),
    [
        ((-0.1, 0.1), {"n_routed_experts": 64, "num_experts_per_tok": 8}),
        ((-0.1, 0.1), {"num_experts_per_tok": 1}),
        ((-0.1, 0.1), {"num_experts_per_tok": 8, "norm_topk_prob": False}),
        ((-1.5, -1.2), {"n_routed_experts": 16, "n_group": 4, "topk_group": 1}),
        ((-1.5, -1.2), {"n_routed_experts": 16, "n_group": 4, "topk_group": 3}),
        ((0.0, 1.0), {"n_routed_experts": 16, "n_group": 8, "topk_group": 2}),
        ((-1.5, 1.5), {"n_routed_experts": 12, "n_group": 2, "routed_scaling_factor": 2.5}),
    ],
    ids=str,
)
def test_router(correction, settings, dtype):
    router, theirs = routers(dtype, correction, **settings)
    x = mx.random.normal((512, SMALL["hidden_size"]), key=mx.random.key(1)).astype(dtype)
    experts = theirs.num_experts
    indices, weights = router(x)
    assert weights.dtype == mx.float32
    got = by_expert(np.array(indices), np.array(weights), experts)
    want = by_expert(*choose(theirs, np.array(x.astype(mx.float32))), experts)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=0)


def test_logits_in_bfloat16_would_choose_others():
    """What the float32 of the router is for; another port computes them in the model's dtype."""
    router, _ = routers(mx.bfloat16, (-0.1, 0.1), n_routed_experts=64, num_experts_per_tok=8)
    x = mx.random.normal((512, SMALL["hidden_size"]), key=mx.random.key(1)).astype(mx.bfloat16)
    ranks = mx.sigmoid((x @ router.weight.T).astype(mx.float32)) + router.e_score_correction_bias
    rough = mx.sort(mx.argsort(-ranks, axis=-1)[:, :8], axis=-1)
    assert (rough != mx.sort(router(x)[0], axis=-1)).any().item()


# --- layouts of checkpoints ---------------------------------------------------------------------


def quantized_apart(model: mlx_nn.Module) -> dict[str, mx.array]:
    """The published layout, with every expert quantized by itself."""
    mlx_nn.quantize(model, 64, 4)
    return published(model)


LAYOUTS = {
    "published": published,
    "fused": fused,
    "stacked": parameters,
    "quantized apart": quantized_apart,
    "with rotary tables": lambda model: {
        **published(model),
        "model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((4,)),
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    model = new_model(config())
    weights = model.sanitize(LAYOUTS[layout](model))
    assert_same(weights, model)
    assert_same(model.sanitize(dict(weights)), weights)


def test_a_copy_of_a_tied_head_is_dropped():
    model = new_model(config(tie_word_embeddings=True))
    assert "lm_head" not in model
    weights = {**published(model), "lm_head.weight": mx.ones((2, 2))}
    assert_same(model.sanitize(weights), model)
    model.set_dtype(mx.float32)
    tokens = mx.array([[1, 2, 3]])
    head = model.model.embed_tokens.weight
    assert mx.allclose(model(tokens), model.model(tokens) @ head.T, atol=1e-5).item()


def test_only_the_layers_for_further_tokens_are_dropped():
    model = new_model(config())
    weights = published(model) | {"model.layers.7.eh_proj.weight": mx.ones((4, 8))}
    kept = model.sanitize(weights)
    assert "model.layers.7.eh_proj.weight" in kept
    assert not any(name.startswith("model.layers.3.") for name in kept)


@pytest.mark.parametrize(
    ("change", "tensor", "reason"),
    [
        (lambda w, n: w.pop(n), "model.layers.1.mlp.experts.5.up_proj.weight", "missing"),
        (lambda w, n: w.update({n: w[n][:3]}), "model.layers.2.mlp.experts.7.down_proj.weight", "[3, 64]"),
        (lambda w, n: w.update({n: w[n].astype(mx.float16)}), "model.layers.2.mlp.experts.1.gate_proj.weight", "float16"),
        (lambda w, n: w.update({n: mx.ones((64, 128), mx.bfloat16)}), "model.layers.1.mlp.experts.8.gate_proj.weight", "n_routed_experts is 8"),
    ],
)  # fmt: skip
def test_experts_that_do_not_fit(change, tensor, reason):
    model = new_model(config())
    weights = published(model)
    change(weights, tensor)
    with pytest.raises(TensorError) as error:
        model.sanitize(weights)
    assert error.value.tensor == tensor and reason in error.value.reason


# --- configuration ------------------------------------------------------------------------------


def test_both_layouts_of_rotary_settings():
    from mlx_lowbit.models.glm4_moe import ModelArgs

    old = {**CONFIG, "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    new = {k: v for k, v in old.items() if not k.startswith(("rope", "partial"))}
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    assert ModelArgs.from_dict({**new, "rope_parameters": rope}) == ModelArgs.from_dict(old)
    assert ModelArgs.from_dict(old).rotary_dims == 8


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from mlx_lowbit.models.glm4_moe import ModelArgs

    theirs = transformers.Glm4MoeConfig()
    own = ModelArgs.from_dict({"unknown": 1, "hidden_size": None, "model_type": "glm4_moe"})
    for name in vars(own):
        if hasattr(theirs, name) and name != "rope_scaling":
            assert getattr(own, name) == getattr(theirs, name), name
    assert own.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", "128"),
        ("num_hidden_layers", True),
        ("num_hidden_layers", 2.0),
        ("rms_norm_eps", float("nan")),
        ("routed_scaling_factor", -1),
        ("use_qk_norm", 1),
        ("num_key_value_heads", 3),
        ("partial_rotary_factor", 2.0),
        ("partial_rotary_factor", 0.1),
        ("n_group", 3),
        ("topk_group", 2),
        ("num_experts_per_tok", 9),
        ("hidden_act", "gelu"),
        ("scoring_func", "softmax"),
        ("topk_method", "greedy"),
        ("rope_scaling", "yarn"),
        ("rope_parameters", [1]),
    ],
)
def test_a_wrong_value_is_refused_by_name(name, value):
    from mlx_lowbit.models.glm4_moe import ModelArgs

    with pytest.raises(ValueError, match=f"^{name}: expected .* got "):
        ModelArgs.from_dict({**CONFIG, name: value})


def test_embeddings_in_place_of_tokens():
    model, tokens = new_model(config()), mx.array([[5, 6, 7, 8]])
    model.set_dtype(mx.float32)
    embedded = model(None, input_embeddings=model.model.embed_tokens(tokens))
    assert mx.array_equal(embedded, model(tokens)).item()


def test_what_may_be_cast_and_quantized():
    model = new_model(config())
    assert model.cast_predicate(ROUTER) and not model.cast_predicate(BIAS)
    mlx_nn.quantize(model, 64, 4, class_predicate=lambda p, m: hasattr(m, "to_quantized"))
    names = parameters(model)
    assert names[ROUTER].dtype == mx.bfloat16 and f"{ROUTER[:-7]}.scales" not in names


# --- the registry -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "file"),
    [
        ({"model_type": "glm4_moe"}, "mlx_lowbit.models.glm4_moe"),
        ({"model_type": "llama"}, "mlx_lm.models.llama"),
        ({"model_type": "phi-msft"}, "mlx_lm.models.phixtral"),
    ],
)
def test_the_module_of_a_configuration(settings, file):
    assert models.module_for(settings).__name__ == file


@pytest.mark.parametrize("name", ["no_such", "..glm4_moe", "glm4_moe/../x", "os", "", None, 3])
def test_an_unknown_model_type_lists_what_is_known(name):
    with pytest.raises(ValueError, match=r"model_type.*known are glm4_moe.*mlx-lm"):
        models.module_for({"model_type": name})


def test_the_type_of_qwen3_asr_may_be_nested():
    assert models.model_type({"thinker_config": {"audio_config": {}}}) == "qwen3_asr"
    assert models.model_type({"model_type": "qwen3_asr", "audio_config": {}}) == "qwen3_asr"
    for wrong in ([], {}, 3):
        settings = {"model_type": "qwen3_asr", "thinker_config": {"model_type": wrong}}
        assert models.model_type(settings) == "qwen3_asr"
    for settings in (
        {"model_type": "qwen3_forced_aligner"},
        {"model_type": "qwen3_asr", "thinker_config": {"model_type": "qwen3_forced_aligner"}},
    ):
        with pytest.raises(ValueError, match="aligner"):
            models.model_type(settings)
