"""accelerate and undo on small modules: what changes, what stays and what is reported."""

from __future__ import annotations

import copy
import sys
import types

import mlx.core as mx
import mlx.nn as mlx_nn
import mlx_lowbit
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lowbit import accelerate, nn, quantize_activations, undo
from small_modules import (
    PATHS,
    Calls,
    K,
    Renamed,
    Splits,
    Wrapper,
    X,
    quantized,
    state,
    states,
    values,
)


@pytest.fixture
def model():
    mx.random.seed(0)
    return Wrapper()


def test_every_place_is_reached_and_undone_exactly(model):
    before, tree = values(model(X)), states(model)
    keys = [name for name, _ in tree_flatten(model.parameters())]
    report = accelerate(model)
    assert sorted(path for path, _, _ in report.replaced) == sorted(PATHS)
    assert {fmt for _, _, fmt in report.replaced} == {"affine4_g64"}
    assert report.left == [] and report.unchanged == 0 and report.cache_bytes == 0
    assert all(type(layer) is nn.QuantizedLinear for layer in model.layers())
    assert type(model.embed) is nn.QuantizedEmbedding and model.tied is model.head
    assert [name for name, _ in tree_flatten(model.parameters())] == keys
    for path, (own, frozen, training, _) in states(model).items():
        assert (own, frozen, training) == tree[path][:3], path
    assert np.abs(values(model(X)) - before).max() < 1e-3 * np.abs(before).max()

    back = undo(model)
    assert sorted(path for path, _, _ in back.replaced) == sorted(PATHS) and back.left == []
    assert states(model) == tree
    assert np.array_equal(values(model(X)), before)


def test_repeating_either_does_nothing(model):
    assert undo(model).replaced == []
    accelerate(model)
    tree = states(model)
    again = accelerate(model)
    assert again.replaced == [] and again.left == [] and again.unchanged == len(PATHS)
    assert states(model) == tree
    undo(model)
    assert undo(model).replaced == []
    assert type(model.head) is mlx_nn.QuantizedLinear


def test_the_products_are_ours(model, monkeypatch):
    """The call of a swapped layer arrives at mlx_lowbit.ops, that of an undone one does not."""
    calls = []
    ops = sys.modules["mlx_lowbit.ops"]
    for name in ("quantized_matmul", "dequantize"):
        own = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, own=own, name=name, **k: (calls.append(name), own(*a, **k))[1]
        )
    model(X)
    assert calls == []
    accelerate(model)
    model(X)
    assert calls.count("quantized_matmul") == len(PATHS) and calls.count("dequantize") == 1
    undo(model)
    model(X)
    assert len(calls) == len(PATHS) + 1


def test_the_model_may_be_one_layer():
    layer = quantized("mxfp8")
    before, held = values(layer(X)), state(layer)
    assert accelerate(layer).replaced == [("", "QuantizedLinear", "mxfp8")]
    assert type(layer) is nn.QuantizedLinear
    undo(layer)
    assert state(layer) == held and np.array_equal(values(layer(X)), before)


def test_saved_files_do_not_change(model, tmp_path):
    model.save_weights(str(tmp_path / "stock.safetensors"))
    accelerate(model)
    model.save_weights(str(tmp_path / "ours.safetensors"))
    stock, ours = (mx.load(str(tmp_path / f"{name}.safetensors")) for name in ("stock", "ours"))
    assert stock.keys() == ours.keys()
    assert all(mx.array_equal(stock[key], ours[key]) for key in stock)


def test_frozen_parameters_stay_frozen():
    model = mlx_nn.Sequential(quantized(), quantized())
    model.layers[0].unfreeze(keys=["scales"])
    before = model.trainable_parameters()["layers"]
    accelerate(model)
    after = model.trainable_parameters()["layers"]
    assert [list(layer) for layer in after] == [list(layer) for layer in before]
    assert "scales" in after[0] and "scales" not in after[1]


@pytest.mark.cpu
def test_dense_layers_on_the_cpu():
    model = mlx_nn.Sequential(*(mlx_nn.Linear(K, K) for _ in range(3)), mlx_nn.ReLU())
    model.layers[1].set_dtype(mx.bfloat16)
    model.layers[2].set_dtype(mx.float16)
    before = values(model(X))
    report = accelerate(model)
    assert [(kind, dtype) for _, kind, dtype in report.replaced] == [
        ("Linear", "float32"),
        ("Linear", "bfloat16"),
        ("Linear", "float16"),
    ]
    assert all(type(layer) is nn.Linear for layer in model.layers[:3])
    assert np.abs(values(model(X)) - before).max() < 1e-2
    undo(model)
    assert np.array_equal(values(model(X)), before)


@pytest.mark.cpu
def test_dense_layers_of_another_dtype_are_left():
    model = mlx_nn.Sequential(mlx_nn.Linear(K, K))
    model.layers[0].weight = mx.zeros((K, K), mx.int8)
    report = accelerate(model)
    assert report.replaced == [] and report.left[0].path == "layers.0"
    assert "int8" in report.left[0].reason and type(model.layers[0]) is mlx_nn.Linear


def test_classes_that_extend_mlxs():
    mx.random.seed(1)
    model = mlx_nn.Module()
    model.own, model.split, model.renamed = Calls(K, K), Splits(K, K), Renamed(K, K)
    model.foreign = mlx_nn.Module()
    model.foreign.weight, model.foreign.scales, _ = mx.quantize(mx.ones((K, K)))
    before = values(mx.stack(model.split(X))), values(model.renamed(X))
    report = accelerate(model)
    assert [path for path, _, _ in report.replaced] == ["split", "renamed"]
    assert report.left == [
        ("own", "Calls computes its product itself"),
        ("foreign", "Module computes its product itself"),
    ]
    assert isinstance(model.split, Splits) and isinstance(model.split, nn.QuantizedLinear)
    assert type(model.split).__name__ == "Splits" and model.renamed.parts() == 2
    for got, expected in zip(
        (values(mx.stack(model.split(X))), values(model.renamed(X))), before, strict=True
    ):
        assert np.abs(got - expected).max() < 1e-4
    other = Splits(K, K)
    accelerate(other)
    assert type(other) is type(model.split)
    assert type(model.own) is Calls and type(model.foreign) is mlx_nn.Module
    undo(model)
    assert type(model.split) is Splits and type(model.renamed) is Renamed
    assert np.array_equal(values(mx.stack(model.split(X))), before[0])


def test_the_product_of_an_extending_class_is_ours(monkeypatch):
    layer, calls = Splits(K, K), []
    ops = sys.modules["mlx_lowbit.ops"]
    own = ops.quantized_matmul
    monkeypatch.setattr(ops, "quantized_matmul", lambda *a, **k: (calls.append(1), own(*a, **k))[1])
    layer(X)
    accelerate(layer)
    layer(X)
    assert calls == [1]


def test_formats_without_a_kernel_are_left():
    model = mlx_nn.Sequential(quantized(bits=1, group_size=32), quantized(bits=2, group_size=32))
    report = accelerate(model)
    assert [path for path, _, _ in report.replaced] == ["layers.1"]
    assert report.left[0].path == "layers.0" and "bits" in report.left[0].reason
    assert type(model.layers[0]) is mlx_nn.QuantizedLinear


def test_mlxs_qq_linear():
    model = mlx_nn.Sequential(mlx_nn.QQLinear(K, K, mode="mxfp8"))
    report = accelerate(model)
    assert report.replaced == [] and "call eval()" in report.left[0].reason
    model.eval()
    layer = model.layers[0]
    before = values(model(X[:1]))  # MLX multiplies single rows only, on the CPU
    assert accelerate(model).replaced == [("layers.0", "QQLinear", "mxfp8")]
    assert type(layer) is nn.QQLinear
    weight = layer.weight
    model.train(), model.eval()
    assert layer.weight is weight and model(X).shape == X.shape
    assert np.abs(values(model(X[:1])) - before).max() < 1e-2
    undo(model)
    assert type(layer) is mlx_nn.QQLinear and np.array_equal(values(model(X[:1])), before)
    model.train()
    assert layer.weight.dtype == mx.bfloat16 and "scales" not in layer


def test_copies_can_be_undone(model):
    before = values(model(X))
    accelerate(model)
    twin = copy.deepcopy(model)
    undo(twin)
    assert type(twin.head) is mlx_nn.QuantizedLinear and type(model.head) is nn.QuantizedLinear
    assert np.array_equal(values(twin(X)), before)


def test_new_layers_made_of_swapped_ones_are_not_undone():
    layer = quantized("mxfp8")
    accelerate(layer)
    for cls in (nn.QuantizedLinear, nn.QQLinear):
        new = cls.from_quantized(layer)
        assert undo(new).replaced == [] and type(new) is cls


def test_layers_made_as_ours_stay():
    layer = nn.QuantizedLinear.from_linear(mlx_nn.Linear(K, K))
    model = mlx_nn.Sequential(layer, quantized())
    assert accelerate(model).unchanged == 1
    report = undo(model)
    assert [path for path, _, _ in report.replaced] == ["layers.1"]
    assert report.left == [("layers.0", "QuantizedLinear was not made by accelerate")]
    assert type(layer) is nn.QuantizedLinear


def test_backends(model, monkeypatch):
    module = sys.modules["mlx_lowbit.accelerate"]
    monkeypatch.setattr(module, "missing_kernel", lambda: "no kernel for this device")
    report = accelerate(model)
    assert report.replaced == [] and len(report.left) == len(PATHS)
    assert {reason for _, reason in report.left} == {"no kernel for this device"}
    assert type(model.head) is mlx_nn.QuantizedLinear
    assert len(accelerate(model, backend="lowbit").replaced) == len(PATHS)
    assert len(accelerate(model, backend="mlx").replaced) == len(PATHS)
    assert type(model.head) is mlx_nn.QuantizedLinear
    with pytest.raises(ValueError, match=r"^backend: expected one of 'auto'.*'mlx', got 'cuda'"):
        accelerate(model, backend="cuda")


@pytest.mark.parametrize("function", [accelerate, undo, quantize_activations])
@pytest.mark.parametrize("thing", [None, {}, lambda x: x, mlx_nn.Linear])
def test_only_modules(function, thing):
    with pytest.raises(TypeError, match=r"^model: expected an mlx.nn.Module, got"):
        function(thing)


@pytest.mark.cpu
def test_the_report_is_one_table():
    model = mlx_nn.Sequential(*(quantized() for _ in range(12)), Calls(K, K), mlx_nn.Linear(K, K))
    lines = str(accelerate(model)).splitlines()
    assert [line.split() for line in lines] == [
        ["layers", "path", "now", "format", "or", "reason"],
        ["12", "layers.*", "QuantizedLinear", "affine4_g64"],
        ["1", "layers.*", "Linear", "float32"],
        ["1", "layers.*", "left", "Calls", "computes", "its", "product", "itself"],
        ["13", "replaced,", "1", "left,", "0", "unchanged;", "private", "caches:", "0", "bytes"],
    ]
    assert str(accelerate(mlx_nn.ReLU())).startswith("0 replaced, 0 left")
    assert "(the model itself)" in str(accelerate(quantized()))


def switch_like(package):
    """Stand-in for a package with stacked layers of its own, as mlx-vlm has."""

    class QuantizedSwitchLinear(mlx_nn.Module):
        def __init__(self, mode):
            super().__init__()
            weight = mx.random.normal((4, K, K))
            self.group_size = self.bits = None  # as after mlx.nn.quantize(model, mode=mode)
            self.mode = mode
            self.weight, self.scales, *biases = mx.quantize(weight, mode=mode)
            self.biases = biases[0] if biases else None

        @property
        def num_experts(self):
            return self.weight.shape[0]

        @property
        def output_dims(self):
            return self.weight.shape[1]

        def __call__(self, x, indices, sorted_indices=False):
            keywords = {name: getattr(self, name) for name in ("mode", "bits", "group_size")}
            return mx.gather_qmm(
                x, self.weight, self.scales, self.biases, rhs_indices=indices, **keywords
            )

    module = types.ModuleType(f"{package}.models.switch_layers")
    module.QuantizedSwitchLinear = QuantizedSwitchLinear
    return module


def test_other_packages_switch_layers(monkeypatch):
    module = switch_like("mlx_vlm")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    base = module.QuantizedSwitchLinear
    model = mlx_nn.Sequential(base("mxfp8"), base("mxfp8"))
    x, indices = X[:, None, None, :], mx.array([[0, 3], [1, 1], [2, 0]])
    before = values(model.layers[0](x, indices))
    assert {kind for _, kind, _ in accelerate(model).replaced} == {"QuantizedSwitchLinear"}
    layer = model.layers[0]
    assert isinstance(layer, base) and type(layer) is type(model.layers[1]) is not base
    assert np.abs(values(layer(x, indices)) - before).max() < 1e-4
    undo(model)
    assert type(layer) is base and np.array_equal(values(layer(x, indices)), before)
    assert {kind for _, kind, _ in quantize_activations(model).replaced} == {"QQSwitchLinear"}
    difference = np.abs(values(layer(x, indices)) - before).max()
    assert repr(layer) == (
        f"QQSwitchLinear(input_dims={K}, output_dims={K}, num_experts=4, bias=False, "
        "group_size=32, bits=8, mode=mxfp8)"
    )
    assert isinstance(layer, base) and 1e-6 < difference < 0.1 * np.abs(before).max()


def test_the_functions_are_not_hidden_by_their_modules():
    assert callable(mlx_lowbit.accelerate) and callable(mlx_lowbit.quantize)
