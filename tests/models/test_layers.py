"""The layers against MLX's own: same storage, same values (to the oracle's), nothing lost."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import oracle
import pytest
from layer_values import (
    K,
    N,
    arrays,
    assert_product,
    decoded,
    dense,
    inputs,
    names,
    packed,
    taken,
)
from mlx.utils import tree_flatten
from mlx_lowbit import formats, nn
from oracle import f64


@pytest.mark.parametrize("bias", [False, True])
def test_quantized_linear_value_and_dtype(judged_fmt, bias, dtype):
    fmt, linear = judged_fmt, dense(bias, dtype)
    layer = nn.QuantizedLinear.from_linear(linear, fmt.group_size, fmt.bits, fmt.mode)
    stock = mlx_nn.QuantizedLinear.from_linear(linear, fmt.group_size, fmt.bits, fmt.mode)
    for shape in [(1,), (3,), (2, 5)]:
        x = inputs(*shape, dtype=dtype)
        assert layer(x).dtype == stock(x).dtype
        assert_product(layer(x), f64(x), decoded(stock), linear.get("bias"))


def test_quantized_linear_stores_what_mlx_stores(fmt):
    linear = dense(dtype=mx.bfloat16)
    layer = nn.QuantizedLinear.from_linear(linear, fmt.group_size, fmt.bits, fmt.mode)
    stock = mlx_nn.QuantizedLinear.from_linear(linear, fmt.group_size, fmt.bits, fmt.mode)
    assert isinstance(layer, mlx_nn.QuantizedLinear)
    assert names(layer) == names(stock)
    for name, value in tree_flatten(stock.parameters()):
        assert layer[name].dtype == value.dtype and mx.array_equal(layer[name], value), name
    assert (layer.mode, layer.bits, layer.group_size) == (fmt.mode, fmt.bits, fmt.group_size)
    assert list(layer.trainable_parameters()) == ["bias"] == list(stock.trainable_parameters())
    assert layer.bias is linear.bias
    assert repr(layer) == repr(stock)
    assert (layer.biases is None) == (not fmt.has_biases)


def test_converting_draws_no_random_numbers(qq_fmt):
    linear, table = dense(), mlx_nn.Embedding(N, K)
    before = [np.array(word) for word in mx.random.state]
    quantized = nn.QuantizedLinear.from_linear(linear, mode=qq_fmt.mode)
    nn.QuantizedLinear.from_quantized(quantized)
    nn.QQLinear.from_linear(linear, mode=qq_fmt.mode)
    nn.QQLinear.from_quantized(quantized)
    nn.QuantizedEmbedding.from_embedding(table, mode=qq_fmt.mode)
    assert all(np.array_equal(a, np.array(b)) for a, b in zip(before, mx.random.state, strict=True))


def test_from_quantized_shares_the_arrays():
    stock = mlx_nn.QuantizedLinear.from_linear(dense(bias=False))
    stock.unfreeze(keys=["scales"])
    layer = nn.QuantizedLinear.from_quantized(stock)
    assert arrays(layer) == arrays(stock) and type(stock) is mlx_nn.QuantizedLinear
    assert list(layer.trainable_parameters()) == ["scales"]
    layer.freeze()
    assert list(stock.trainable_parameters()) == ["scales"]
    table = mlx_nn.QuantizedEmbedding(N, K)
    assert arrays(nn.QuantizedEmbedding.from_quantized(table)) == arrays(table)
    stock = mlx_nn.QuantizedLinear.from_linear(dense(), mode="mxfp8")
    qq = nn.QQLinear.from_quantized(stock)
    assert arrays(qq) == arrays(stock) == arrays(nn.QuantizedLinear.from_quantized(qq))


@pytest.mark.parametrize("bias", [False, True])
def test_qq_linear_value(qq_fmt, bias, dtype):
    linear = dense(bias, dtype)
    layer = nn.QQLinear.from_linear(linear, mode=qq_fmt.mode)
    assert isinstance(layer, mlx_nn.QQLinear)
    for shape in [(1,), (3,), (2, 5)]:
        x = inputs(*shape, dtype=dtype)
        assert layer(x).dtype == dtype
        assert_product(layer(x), taken(x, qq_fmt), decoded(layer), linear.get("bias"))


def test_qq_linear_keeps_its_weight_through_train_and_eval(qq_fmt):
    layer = nn.QQLinear.from_linear(dense(), mode=qq_fmt.mode)
    x, held = inputs(3), arrays(layer)
    before = np.array(layer(x))
    for _ in range(2):
        for mode in (True, False):
            mlx_nn.Sequential(layer).train(mode)
            assert layer.training is mode
            assert arrays(layer) == held
            assert np.array_equal(np.array(layer(x)), before)
    layer.quantize()
    with pytest.raises(RuntimeError, match="keeps its quantized weight"):
        layer.dequantize()
    assert arrays(layer) == held


def test_qq_linear_constructor():
    layer = nn.QQLinear(K, N, mode="mxfp8", bias=True)
    assert (layer.mode, layer.bits, layer.group_size) == ("mxfp8", 8, 32)
    assert layer.weight.dtype == mx.uint32 and layer.bias.shape == (N,)
    assert layer(inputs(2)).shape == (2, N) and layer.trainable_parameters() == {}
    assert "bias" not in nn.QQLinear(K, N) and nn.QQLinear(K, N).mode == "nvfp4"
    assert "input_dims=256, output_dims=72, bias=True" in repr(layer) and "mode=mxfp8" in repr(
        layer
    )


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_other_modes_are_refused_for_activations(mode):
    quantized = mlx_nn.QuantizedLinear.from_linear(dense(), mode=mode)
    for make in (
        lambda: nn.QQLinear(K, N, mode=mode),
        lambda: nn.QQLinear.from_linear(dense(), mode=mode),
        lambda: nn.QQLinear.from_quantized(quantized),
        lambda: nn.Linear.from_linear(dense()).to_quantized(mode=mode, quantize_input=True),
    ):
        with pytest.raises(ValueError, match=f"'{mode}'.*'mxfp8' and 'nvfp4'"):
            make()


def test_embedding(judged_fmt):
    fmt, table = judged_fmt, mlx_nn.Embedding(N, K)
    layer = nn.QuantizedEmbedding.from_embedding(table, fmt.group_size, fmt.bits, fmt.mode)
    stock = mlx_nn.QuantizedEmbedding.from_embedding(table, fmt.group_size, fmt.bits, fmt.mode)
    assert isinstance(layer, mlx_nn.QuantizedEmbedding) and names(layer) == names(stock)
    assert repr(layer) == repr(stock) and layer.trainable_parameters() == {}
    rows = mx.array([[0, N - 1, 3], [3, 7, 7]])
    assert layer(rows).dtype == stock(rows).dtype
    expected = decoded(stock)[np.array(rows)]
    step = oracle.ROUNDOFF[layer(rows).dtype]
    assert np.abs(f64(layer(rows)) - expected).max() <= 2 * step * np.abs(expected).max()
    assert mx.array_equal(layer(mx.array(3)), layer(rows)[1, 0])
    assert layer(mx.zeros((0, 2), mx.int32)).shape == (0, 2, K)
    x = inputs(2, 3)
    assert_product(layer.as_linear(x), f64(x), decoded(stock))


@pytest.mark.parametrize("cls", [nn.QuantizedLinear, nn.QQLinear], ids=lambda cls: cls.__name__)
def test_global_scale(cls, tmp_path):
    linear = dense()
    layer = cls.from_linear(linear, mode="nvfp4", global_scale=True)
    amax = mx.abs(linear.weight).max().item()
    assert layer.global_scale.item() == amax
    # As large as e4m3 scales reach, so that a factor on x would clip it.
    weight, x = oracle.decode(layer, packed(layer), amax), inputs(3) * 700
    assert 1344 < mx.abs(x).max() < 2688
    assert np.abs(weight - f64(linear.weight)).max() < amax / 5
    seen = taken(x, formats.get(mode="nvfp4")) if cls is nn.QQLinear else f64(x)
    assert_product(layer(x), seen, weight, linear.bias)

    path = str(tmp_path / "layer.safetensors")
    layer.save_weights(path)
    assert mx.load(path)["global_scale"].dtype == mx.float32
    other = cls.from_linear(dense(seed=1), mode="nvfp4", global_scale=True)
    other.load_weights(path)
    assert mx.array_equal(other(x), layer(x))
    with pytest.raises(ValueError, match="global_scale"):
        mlx_nn.QuantizedLinear.from_linear(linear, mode="nvfp4").load_weights(path)

    layer.set_dtype(mx.bfloat16)
    assert layer(x.astype(mx.bfloat16)).dtype == mx.bfloat16
    with pytest.raises(ValueError, match="global_scale"):
        cls.from_linear(linear, mode="mxfp8", global_scale=True)


@pytest.mark.parametrize("bias", [False, True])
def test_dense_linear(bias, dtype):
    stock = dense(bias, dtype)
    layer = nn.Linear.from_linear(stock)
    assert isinstance(layer, mlx_nn.Linear) and arrays(layer) == arrays(stock)
    assert repr(layer) == repr(stock)
    for shape in [(1,), (3,), (2, 5)]:
        x = inputs(*shape, dtype=dtype)
        assert layer(x).dtype == stock(x).dtype
        assert_product(layer(x), f64(x), f64(stock.weight), stock.get("bias"))


def test_dense_linear_gradients():
    stock = dense()
    layer, x = nn.Linear.from_linear(stock), inputs(4)

    def gradients(of):
        loss = mlx_nn.value_and_grad(of, lambda x: (of(x) ** 2).sum())
        return {**loss(x)[1], "x": mx.grad(lambda x: (of(x) ** 2).sum())(x)}

    expected, got = gradients(stock), gradients(layer)
    assert sorted(got) == ["bias", "weight", "x"]
    for name, value in expected.items():
        assert mx.allclose(got[name], value, rtol=1e-4, atol=1e-3), name


def test_dense_linear_quantizes_to_our_layers():
    model = mlx_nn.Sequential(nn.Linear.from_linear(dense()), mlx_nn.ReLU())
    mlx_nn.quantize(model, group_size=32, bits=3)
    layer = model.layers[0]
    assert type(layer) is nn.QuantizedLinear and (layer.bits, layer.group_size) == (3, 32)
    qq = nn.Linear.from_linear(dense()).to_quantized(mode="mxfp8", quantize_input=True)
    assert type(qq) is nn.QQLinear and "bias" in qq


def test_gradients_of_unfrozen_scales_biases_and_bias(affine_fmt):
    fmt = affine_fmt
    stock = mlx_nn.QuantizedLinear.from_linear(dense(), fmt.group_size, fmt.bits, fmt.mode)
    layer, x = nn.QuantizedLinear.from_quantized(stock), inputs(4)
    grads = []
    for of in (stock, layer):
        of.unfreeze(keys=["scales", "biases", "bias"])
        grads.append(mlx_nn.value_and_grad(of, lambda x, of=of: (of(x) ** 2).sum())(x)[1])
    assert sorted(grads[1]) == ["bias", "biases", "scales"]
    for name, value in grads[0].items():
        scale = mx.abs(value).max()
        assert mx.allclose(grads[1][name] / scale, value / scale, atol=1e-4), name


def test_checkpoints_are_mlxs(judged_fmt, tmp_path):
    fmt = judged_fmt

    def build(seed, linear_class, embedding_class):
        class Pair(mlx_nn.Module):
            def __init__(self):
                super().__init__()
                arguments = (fmt.group_size, fmt.bits, fmt.mode)
                self.table = embedding_class.from_embedding(mlx_nn.Embedding(N, K), *arguments)
                self.heads = [linear_class.from_linear(dense(seed=seed), *arguments)]

        mx.random.seed(seed)
        return Pair()

    stock = (mlx_nn.QuantizedLinear, mlx_nn.QuantizedEmbedding)
    own = (nn.QuantizedLinear, nn.QuantizedEmbedding)
    for writer, reader in ((stock, own), (own, stock)):
        source, target = build(1, *writer), build(2, *reader)
        path = str(tmp_path / "model.safetensors")
        source.save_weights(path)
        target.load_weights(path, strict=True)
        for (name, a), (other, b) in zip(
            tree_flatten(source.parameters()), tree_flatten(target.parameters()), strict=True
        ):
            assert name == other and a.dtype == b.dtype and mx.array_equal(a, b)


def test_train_and_eval_leave_weight_only_layers_alone():
    layer = nn.QuantizedLinear.from_linear(dense())
    table = nn.QuantizedEmbedding.from_embedding(mlx_nn.Embedding(N, K))
    held = arrays(layer), arrays(table)
    for mode in (True, False, True):
        layer.train(mode), table.train(mode)
        assert (arrays(layer), arrays(table)) == held


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: nn.QuantizedLinear.from_linear(nn.QuantizedLinear(K, N)), "linear_layer"),
        (lambda: nn.QuantizedLinear.from_linear(None), "linear_layer"),
        (lambda: nn.QQLinear.from_linear(mlx_nn.ReLU()), "linear_layer"),
        (lambda: nn.QuantizedLinear.from_quantized(dense()), "layer"),
        (lambda: nn.QQLinear.from_quantized(mlx_nn.QQLinear(K, N)), "layer"),
        (lambda: nn.QuantizedEmbedding.from_quantized(nn.QuantizedLinear(K, N)), "layer"),
        (lambda: nn.QuantizedEmbedding.from_embedding({}), "embedding_layer"),
        (lambda: nn.Linear.from_linear(nn.QuantizedLinear(K, N)), "linear_layer"),
    ],
)
def test_wrong_layers_are_refused_by_name(make, argument):
    with pytest.raises(TypeError, match=f"^{argument}: expected"):
        make()


def test_formats_and_values_are_checked():
    with pytest.raises(ValueError, match="bits"):
        nn.QuantizedLinear.from_linear(dense(), bits=7)
    with pytest.raises(ValueError, match="mode"):
        nn.QuantizedLinear.from_linear(dense(), mode="int4")
    broken = dense()
    broken.weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="w"):
        nn.QuantizedLinear.from_linear(broken)
    layer = nn.QuantizedLinear.from_linear(broken, nan_policy="propagate")
    assert mx.isnan(layer(inputs(1))).any()


def test_mlx_lm_is_imported_only_for_its_layers():
    code = (
        "import sys, mlx_lowbit; assert 'mlx_lm' not in sys.modules; "
        "assert not hasattr(mlx_lowbit.nn, 'NoSuchLayer') and 'mlx_lm' not in sys.modules; "
        "assert 'QQSwitchLinear' in dir(mlx_lowbit.nn); "
        "assert hasattr(mlx_lowbit.nn, 'QuantizedSwitchLinear') and 'mlx_lm' in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
