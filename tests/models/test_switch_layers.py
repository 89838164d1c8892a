"""The layers over stacks of matrices against mlx-lm's: same storage, the oracle's values."""

from __future__ import annotations

import inspect

import mlx.core as mx
import numpy as np
import oracle
import pytest
from layer_values import (
    E,
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
from mlx_lowbit import formats, nn
from oracle import f64


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


@pytest.mark.parametrize("op", ["gather_qmm", "gather_qqmm"])
def test_switch_layers_pass_on_that_indices_are_sorted(op, monkeypatch):
    from mlx_lowbit import ops

    seen = []
    monkeypatch.setattr(ops, op, lambda *_, **keywords: seen.append(keywords["sorted_indices"]))
    kind = nn.QuantizedSwitchLinear if op == "gather_qmm" else nn.QQSwitchLinear
    layer = kind.from_linear(stack(), mode="mxfp8")
    layer(inputs(1), mx.array([0]), sorted_indices=True)
    layer(inputs(1), mx.array([0]))
    assert seen == [True, False]


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
    assert made.global_scale is None and made.trainable_parameters() == {}
    assert (made.input_dims, made.output_dims, made.num_experts) == (K, N, E)


@pytest.mark.parametrize("kind", ["QuantizedSwitchLinear", "QQSwitchLinear"])
@pytest.mark.parametrize("bias", [False, True])
def test_switch_global_scales(kind, bias, dtype):
    linear = stack(bias)
    linear.weight = linear.weight * mx.array([1.0, 0.1, 10, 3, 1])[:, None, None]
    linear.set_dtype(dtype)
    layer = getattr(nn, kind).from_linear(linear, mode="nvfp4", global_scale=True)
    assert names(layer) == ["bias"] * bias + ["global_scale", "scales", "weight"]
    assert layer.global_scale.dtype == mx.float32 and layer.global_scale.shape == (E,)
    for e in range(E):
        amax = mx.abs(linear.weight[e]).max().astype(mx.float32)
        stored = mx.quantize(linear.weight[e], mode="nvfp4", global_scale=amax)
        held = layer.weight[e], layer.scales[e], layer.global_scale[e]
        assert all(mx.array_equal(a, b) for a, b in zip(held, (*stored, amax), strict=True))
    whole = packed(layer)
    weight = np.stack(
        [
            oracle.decode(layer, oracle.Weight(words, scales), amax)
            for words, scales, amax in zip(
                whole.words, whole.scales, f64(layer.global_scale), strict=True
            )
        ]
    )
    x = inputs(4, dtype=dtype)
    seen = taken(x, formats.get(mode="nvfp4")) if kind == "QQSwitchLinear" else f64(x)
    y = layer(x[:, None, None, :], mx.array(INDICES))
    assert y.dtype == dtype
    for (t, e), value in zip(np.ndindex(INDICES.shape), y.reshape(-1, 1, N), strict=True):
        chosen = INDICES[t, e]  # one by one: their magnitudes differ
        assert_product(
            value, seen[t : t + 1], weight[chosen], linear.bias[chosen] if bias else None
        )


def test_switch_global_scales_are_mlx_lms():
    linear = stack()
    if "global_scale" not in inspect.signature(linear.to_quantized).parameters:
        pytest.skip("mlx-lm before 0.32 has no global scales")
    stock = linear.to_quantized(mode="nvfp4", group_size=16, bits=4, global_scale=True)
    layer = nn.QuantizedSwitchLinear.from_linear(linear, mode="nvfp4", global_scale=True)
    assert names(layer) == names(stock)
    assert all(mx.array_equal(layer[name], stock[name]) for name in names(stock))


def test_switch_constructor_with_global_scales():
    made = nn.QQSwitchLinear(K, N, E, bias=False, global_scale=True)
    assert (made.mode, made.global_scale.shape, "bias" in made) == ("nvfp4", (E,), False)
    assert made.trainable_parameters() == {}
    with pytest.raises(ValueError, match="global_scale"):
        nn.QQSwitchLinear(K, N, E, mode="mxfp8", global_scale=True)


def test_switch_refusals():
    for make in (
        lambda: nn.QQSwitchLinear.from_linear(stack(), mode="affine"),
        lambda: nn.QQSwitchLinear.from_quantized(stack().to_quantized(mode="affine")),
        lambda: nn.QQSwitchLinear(K, N, E, mode="affine"),
    ):
        with pytest.raises(ValueError, match=r"'affine'.*'mxfp8' and 'nvfp4'"):
            make()
    with pytest.raises(TypeError, match=r"^switch_linear: expected"):
        nn.QuantizedSwitchLinear.from_linear(dense())
    with pytest.raises(TypeError, match=r"^layer: expected"):
        nn.QuantizedSwitchLinear.from_quantized(nn.QuantizedLinear(K, N))
