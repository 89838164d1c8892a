"""The layers against MLX's own: same storage, same values (to the oracle's), nothing lost."""

from __future__ import annotations

import subprocess
import sys

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import oracle
import pytest
from mlx.utils import tree_flatten
from mlx_lowbit import formats, nn
from oracle import f64, to_numpy

K, N, E = 256, 72, 5


def packed(layer):
    """What ``layer`` stores, for the oracle."""
    biases = layer.get("biases")
    return oracle.Weight(
        to_numpy(layer.weight), to_numpy(layer.scales), None if biases is None else to_numpy(biases)
    )


def decoded(layer):
    """The weight of ``layer`` in float64."""
    return oracle.decode(layer, packed(layer))


def taken(x, fmt):
    """x in float64 as an activation-quantized product sees it."""
    return oracle.decode(fmt, oracle.encode(fmt, to_numpy(x)))


def assert_product(y, x, weight, bias=None):
    """y [..., N] against x [..., K] (float64) @ weight [N, K]^T + bias."""
    product = oracle.matmul(x, weight, bias=None if bias is None else f64(bias))
    oracle.assert_close(y, product, x.shape[-1])


def dense(bias=True, dtype=mx.float32, seed=0):
    mx.random.seed(seed)
    linear = mlx_nn.Linear(K, N, bias=bias)
    linear.set_dtype(dtype)
    return linear


def inputs(*shape, dtype=mx.float32):
    return mx.random.normal((*shape, K), key=mx.random.key(3)).astype(dtype)


def names(layer):
    return sorted(name for name, _ in tree_flatten(layer.parameters()))


def arrays(layer):
    return {name: id(value) for name, value in layer.items() if isinstance(value, mx.array)}


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
    weight, x = oracle.decode(layer, packed(layer), amax), inputs(3)
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


def stack(bias=True, dtype=mx.float32):
    from mlx_lm.models.switch_layers import SwitchLinear

    mx.random.seed(0)
    layer = SwitchLinear(K, N, E, bias=bias)
    if bias:
        layer.bias = mx.random.normal((E, N))
    layer.set_dtype(dtype)
    return layer


INDICES = np.array([[0, 4], [4, 4], [1, 0], [2, 3]], np.uint32)


def assert_picked(y, x, weight, indices, bias=None):
    """y [T, top, 1, N]: x [T, K] (float64) with the matrices that indices [T, top] name."""
    product = oracle.gather(
        x[:, None, :],
        weight,
        np.arange(len(x))[:, None].repeat(indices.shape[1], 1),
        indices,
        bias=None if bias is None else f64(bias),
    )
    oracle.assert_close(y, product, x.shape[-1])


@pytest.mark.parametrize("bias", [False, True])
def test_switch_linear(judged_fmt, bias, dtype):
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear

    fmt, linear = judged_fmt, stack(bias, dtype)
    stock = linear.to_quantized(fmt.group_size, fmt.bits, fmt.mode)
    layer = nn.QuantizedSwitchLinear.from_linear(linear, fmt.group_size, fmt.bits, fmt.mode)
    assert isinstance(layer, QuantizedSwitchLinear) and names(layer) == names(stock)
    assert (layer.input_dims, layer.output_dims, layer.num_experts) == (K, N, E)
    assert mx.array_equal(layer.weight, stock.weight)
    assert list(layer.trainable_parameters()) == (["bias"] if bias else [])
    assert arrays(nn.QuantizedSwitchLinear.from_quantized(stock)) == arrays(stock)
    assert "num_experts=5" in repr(layer)
    x = inputs(4, dtype=dtype)
    y = layer(x[:, None, None, :], mx.array(INDICES))
    assert_picked(y, f64(x), decoded(layer), INDICES, linear.get("bias"))
    order, x = np.array([0, 0, 2, 2, 4], np.uint32), inputs(5, dtype=dtype)
    y = layer(x[:, None, :], mx.array(order), sorted_indices=True)
    assert_picked(y[:, None], f64(x), decoded(layer), order[:, None], linear.get("bias"))


def test_qq_switch_linear(qq_fmt):
    fmt, linear = qq_fmt, stack()
    layer = nn.QQSwitchLinear.from_linear(linear, mode=fmt.mode)
    assert isinstance(layer, type(linear.to_quantized(fmt.group_size, fmt.bits, fmt.mode)))
    held = arrays(layer)
    layer.train(), layer.eval()
    assert arrays(layer) == held == arrays(nn.QQSwitchLinear.from_quantized(layer))
    x = inputs(4)
    y = layer(x[:, None, None, :], mx.array(INDICES))
    assert_picked(y, taken(x, fmt), decoded(layer), INDICES, linear.bias)
    made = nn.QQSwitchLinear(K, N, E, mode=fmt.mode)
    assert made.group_size == fmt.group_size and made.bits == fmt.bits and "bias" in made


@pytest.mark.parametrize("kind", ["QuantizedSwitchLinear", "QQSwitchLinear"])
def test_switch_global_scales(kind):
    linear = stack(bias=False)
    linear.weight = linear.weight * mx.array([1.0, 0.1, 10, 3, 1])[:, None, None]
    layer = getattr(nn, kind).from_linear(linear, mode="nvfp4", global_scale=True)
    stock = linear.to_quantized(mode="nvfp4", group_size=16, bits=4, global_scale=True)
    assert layer.global_scale.shape == (E,) and names(layer) == names(stock)
    assert all(mx.array_equal(layer[name], stock[name]) for name in names(stock))
    whole = packed(layer)
    weight = np.stack(
        [
            oracle.decode(layer, oracle.Weight(words, scales), amax)
            for words, scales, amax in zip(
                whole.words, whole.scales, f64(layer.global_scale), strict=True
            )
        ]
    )
    x = inputs(4)
    seen = taken(x, formats.get(mode="nvfp4")) if kind == "QQSwitchLinear" else f64(x)
    assert_picked(layer(x[:, None, None, :], mx.array(INDICES)), seen, weight, INDICES)


def test_switch_refusals():
    for make in (
        lambda: nn.QQSwitchLinear.from_linear(stack(), mode="affine"),
        lambda: nn.QQSwitchLinear.from_quantized(stack().to_quantized(mode="affine")),
        lambda: nn.QQSwitchLinear(K, N, E, mode="affine"),
    ):
        with pytest.raises(ValueError, match="'affine'.*'mxfp8' and 'nvfp4'"):
            make()
    with pytest.raises(TypeError, match="^switch_linear: expected"):
        nn.QuantizedSwitchLinear.from_linear(dense())
    with pytest.raises(TypeError, match="^layer: expected"):
        nn.QuantizedSwitchLinear.from_quantized(nn.QuantizedLinear(K, N))
