"""quantize_activations on small modules: what changes, what stays and what is refused."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
from mlx_lowbit import accelerate, nn, quantize_activations, undo
from small_modules import PATHS, Calls, K, Splits, Wrapper, X, quantized, states, values


@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("mode", ["mxfp8", "nvfp4"])
def test_quantize_activations_keeps_what_was_loaded(mode, accelerated):
    mx.random.seed(2)
    model = Wrapper(mode)
    before, tree = values(model(X)), states(model)
    if accelerated:
        accelerate(model)
    report = quantize_activations(model)
    assert sorted(path for path, _, _ in report.replaced) == sorted(PATHS[1:])
    assert {(kind, fmt) for _, kind, fmt in report.replaced} == {("QQLinear", mode)}
    assert report.left == [("embed", "QuantizedEmbedding stays weight-only")]
    assert all(type(layer) is nn.QQLinear for layer in model.layers()) and model.tied is model.head
    for path, (own, frozen, training, _) in states(model).items():
        assert (own, frozen, training) == tree[path][:3], path
    after = values(model(X))
    assert 1e-6 < np.linalg.norm(after - before) / np.linalg.norm(before) < 0.6
    model.train(), model.eval()
    assert np.array_equal(values(model(X)), after)
    again = quantize_activations(model)
    assert again.replaced == [] and again.unchanged == len(PATHS) - 1
    undo(model)
    assert type(model.head) is nn.QQLinear and type(model.embed) is mlx_nn.QuantizedEmbedding


@pytest.mark.parametrize("accelerated", [False, True])
def test_quantize_activations_of_extending_classes(accelerated):
    model = mlx_nn.Sequential(Splits(K, K, mode="mxfp8"))
    if accelerated:
        accelerate(model)
    quantize_activations(model)
    layer = model.layers[0]
    assert isinstance(layer, nn.QQLinear) and isinstance(layer, Splits) and len(layer(X)) == 2
    model = mlx_nn.Sequential(quantized("mxfp8"), Calls(K, K, mode="mxfp8"))
    with pytest.raises(ValueError, match=r"^layers.1: Calls computes its product itself"):
        quantize_activations(model)
    assert type(model.layers[0]) is mlx_nn.QuantizedLinear


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_other_modes_are_refused_before_anything_changes(mode):
    model = mlx_nn.Sequential(quantized("nvfp4"), quantized(mode), quantized(mode))
    tree = states(model)
    with pytest.raises(ValueError) as caught:
        quantize_activations(model)
    message = str(caught.value)
    assert message.startswith(f"layers.1: QuantizedLinear is in mode '{mode}'")
    assert "1 more" in message and "'mxfp8' or 'nvfp4'" in message and "skip_unsupported" in message
    assert states(model) == tree
    report = quantize_activations(model, skip_unsupported=True)
    assert [path for path, _, _ in report.replaced] == ["layers.0"]
    assert report.left == [(f"layers.{i}", f"QuantizedLinear is in mode '{mode}'") for i in (1, 2)]
    assert [type(layer) for layer in model.layers[1:]] == [mlx_nn.QuantizedLinear] * 2


def test_unquantized_models_are_refused():
    for model in (mlx_nn.Linear(K, K), mlx_nn.Sequential(mlx_nn.QuantizedEmbedding(K, K))):
        with pytest.raises(ValueError, match=r"^model: expected quantized.*'mxfp8' or 'nvfp4'"):
            quantize_activations(model, skip_unsupported=True)
