"""Compiled steps of a transformer block: the bits of its own forward pass, whatever happens to it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import strategies
from mlx_lowbit import accelerate, formats, quantize_activations, set_backend, undo
from mlx_lowbit.nn import step

llama = pytest.importorskip("mlx_lm.models.llama")
cache_module = pytest.importorskip("mlx_lm.models.cache")

CONFIG = {
    "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 160,
    "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
PATHS = ["model.layers.0", "model.layers.1"]


def made(fmt, dtype=mx.bfloat16, bias=False, **options):
    mx.random.seed(3)
    args = {**CONFIG, "attention_bias": bias, "mlp_bias": bias}
    model = llama.Model(llama.ModelArgs.from_dict(args))
    model.set_dtype(dtype)
    mlx_nn.quantize(model, **strategies.format_keywords(fmt))
    mx.eval(model.parameters())
    return model, accelerate(model, **options)


def decoded(model, batch=1, tokens=4):
    """Logits of a prompt and of some tokens after it."""
    cache = cache_module.make_prompt_cache(model)
    rows = [model(mx.arange(3 * batch).reshape(batch, 3), cache=cache)[:, -1]]
    for i in range(tokens):
        rows.append(model(mx.arange(batch)[:, None] + i, cache=cache)[:, -1])
    return np.array(mx.stack(rows).astype(mx.float32))


@pytest.fixture
def usual_fmt():
    return formats.get("affine", 4, 64)


@pytest.fixture
def steps(monkeypatch):
    """Counts the steps that were taken."""
    taken, own = [], step.Step.__call__
    monkeypatch.setattr(step.Step, "__call__", lambda *a: taken.append(1) or own(*a))
    return taken


def test_the_text_of_the_forward_passes_is_known():
    for (name, *names), digests in step.KNOWN.items():
        module = pytest.importorskip(name)
        assert step.forward_digest(*(getattr(module, each) for each in names)) in digests


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_same_bits(judged_fmt, dtype, merge, batch, steps):
    expected = decoded(made(judged_fmt, dtype, merge=merge, compile=False)[0], batch)
    assert not steps
    model, report = made(judged_fmt, dtype, merge=merge, compile=True)
    assert report.compiled == PATHS
    assert np.array_equal(decoded(model, batch), expected) and len(steps) == 8
    undo(model)
    assert all(type(block) is llama.TransformerBlock for block in model.layers)
    assert not any(step.STEP in vars(block) for block in model.layers)


def test_blocks_of_our_own_definition(usual_fmt, steps):
    """Moxin's decoder."""
    mistral = pytest.importorskip("mlx_lowbit.models.mistral")

    def model(**options):
        mx.random.seed(3)
        own = mistral.Model(mistral.ModelArgs.from_dict({**CONFIG, "model_type": "mistral"}))
        own.set_dtype(mx.bfloat16)
        mlx_nn.quantize(own, **strategies.format_keywords(usual_fmt))
        return own, accelerate(own, **options)

    expected = decoded(model(merge=True, compile=False)[0])
    compiled, report = model(merge=True, compile=True)
    assert report.compiled == PATHS
    assert np.array_equal(decoded(compiled), expected) and len(steps) == 8


def test_weights_belong_to_the_products(usual_fmt, count):
    model, _ = made(usual_fmt, merge=True, compile=True)
    count.clear()
    decoded(model)
    # For the prompt every layer, gate and up in one, and the head; for four tokens the head alone.
    assert count == ["quantized_matmul"] * (6 * 2 + 1 + 4)


def test_bias(judged_fmt):
    model, _ = made(judged_fmt, merge=True, compile=True)
    for layer in (model.layers[0].self_attn.q_proj, model.layers[1].mlp.down_proj):
        layer.bias = mx.ones((layer.scales.shape[0],), mx.bfloat16)
    accelerate(model, merge=True, compile=False)
    expected = decoded(model)
    assert accelerate(model, compile=True).compiled == PATHS
    assert np.array_equal(decoded(model), expected)


def replaced(model):
    model.layers[0].mlp.up_proj.scales = model.layers[0].mlp.up_proj.scales * 2


def in_place(model):
    model.layers[0].input_layernorm.weight *= 2


def another_layer(model):
    model.layers[0].self_attn.o_proj = copy.deepcopy(model.layers[1].self_attn.o_proj)


@pytest.mark.parametrize("change", [replaced, in_place, another_layer])
def test_changes_are_noticed(change, usual_fmt, steps):
    model, _ = made(usual_fmt, compile=True, merge=False)
    decoded(model), change(model)
    steps.clear()
    got = decoded(model)
    assert len(steps) == 4 and step.STEP not in vars(model.layers[0])
    apart, _ = made(usual_fmt, compile=False, merge=False)
    change(apart)
    assert np.array_equal(got, decoded(apart))
    assert accelerate(model, compile=True).compiled == PATHS
    assert np.array_equal(got, decoded(model))


def test_another_backend_and_activations(qq_fmt, steps):
    model, _ = made(qq_fmt, compile=True)
    decoded(model), steps.clear()
    set_backend("mlx")
    try:
        decoded(model)
    finally:
        set_backend("auto")
    assert not steps
    quantize_activations(model)
    decoded(model)
    assert not steps


def test_gradients_and_copies(usual_fmt, steps):
    model, _ = made(usual_fmt, compile=True)
    block = model.layers[0]
    x = mx.random.normal((1, 1, 128))
    grad = mx.grad(lambda x: block(x, None, cache_module.KVCache()).sum())
    expected = mx.grad(lambda x: block(mx.concatenate([x, x], 1), None, None)[:, :1].sum())
    assert grad(x).shape == expected(x).shape and not steps
    assert copy.deepcopy(block)._step is None and pickle.loads(pickle.dumps(block._step)) is None


def test_a_model_is_let_go(usual_fmt):
    model, _ = made(usual_fmt, compile=True, merge=True)
    decoded(model)
    seen = weakref.ref(model.layers[0])
    del model
    gc.collect()
    assert seen() is None


def test_other_texts_are_left(usual_fmt, monkeypatch):
    monkeypatch.setattr(step, "KNOWN", {key: () for key in step.KNOWN})
    assert made(usual_fmt, compile=True)[1].compiled == []


def test_compile_decides(usual_fmt):
    model, report = made(usual_fmt, compile=True)
    assert "compiled" in str(report) and accelerate(model, compile=None).compiled == []
    assert all(step.STEP in vars(block) for block in model.layers)
    assert accelerate(model, compile=False).compiled == []
    assert all(type(block) is llama.TransformerBlock for block in model.layers)
    with pytest.raises(TypeError, match=r"^compile: expected True, False or None, got 1$"):
        accelerate(model, compile=1)
