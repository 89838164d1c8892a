"""Qwen3 against transformers, and its attention against float64."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import qwen3_asr_values as values
from mlx_lowbit import models, set_backend
from mlx_lowbit.models import qwen3


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_alone(tied):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = {**values.TEXT, "tie_word_embeddings": tied}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    torch.manual_seed(1)
    theirs = Qwen3ForCausalLM(Qwen3Config(**settings, rope_parameters=rope)).eval()
    config = {**settings, "model_type": "qwen3", "rope_parameters": rope}
    module = models.module_for(config)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = {name: mx.array(value.numpy()) for name, value in theirs.state_dict().items()}
    assert "lm_head.weight" in weights
    model.load_weights(list(model.sanitize(weights).items()))
    tokens = np.random.default_rng(0).integers(0, 288, (2, 40))
    with torch.no_grad():
        want = theirs(torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(np.array(model(mx.array(tokens))), want, atol=2e-5, rtol=0)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize(("length", "before"), [(16, 0), (40, 7), (257, 0), (300, 100), (5, 9)])
@pytest.mark.parametrize("mask", [None, "causal"])
def test_attention(mask, length, before, heads):
    rng = np.random.default_rng(0)
    shapes = [(2, heads[0], length), (2, heads[1], length + before), (2, heads[1], length + before)]
    q, k, v = (rng.standard_normal((*shape, 32)) for shape in shapes)
    k, v = (np.repeat(each, heads[0] // heads[1], axis=1) for each in (k, v))
    scores = q @ k.swapaxes(-1, -2) / 32**0.5
    if mask is not None:
        scores = np.where(np.tri(*scores.shape[-2:], before, bool), scores, -np.inf)
    chances = np.exp(scores - scores.max(-1, keepdims=True))
    want = chances / chances.sum(-1, keepdims=True) @ v
    every = heads[0] // heads[1]
    q, k, v = (mx.array(each.astype(np.float32)) for each in (q, k[:, ::every], v[:, ::every]))
    got = qwen3.attention(q, k, v, scale=32**-0.5, mask=mask)
    np.testing.assert_allclose(np.array(got), want, atol=2e-6)


@pytest.mark.cpu
def test_attention_is_ours_on_a_cpu(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("MLX's attention ran")

    q = mx.ones((1, 2, 20, 8))
    monkeypatch.setattr(qwen3, "scaled_dot_product_attention", refuse)
    mx.eval(qwen3.attention(q, q, q, scale=1.0, mask="causal"))
    with pytest.raises(AssertionError, match="ran"):
        qwen3.attention(q[:, :, :1], q, q, scale=1.0)
    set_backend("mlx")
    try:
        with pytest.raises(AssertionError, match="ran"):
            qwen3.attention(q, q, q, scale=1.0)
    finally:
        set_backend("auto")


@pytest.mark.parametrize("kind", [{"type": "mrope"}, {"rope_type": "default"}, {}])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_equal_rows_of_positions_are_the_plain_rotation(kind, place):
    rope = {**kind, "mrope_section": [24, 20, 20], "interleaved": True, "rope_theta": 1e6}
    args = qwen3.ModelArgs.from_dict({place: rope, "rope_theta": 1e6})
    assert args.rope_scaling is None and args.rope_theta == 1e6
