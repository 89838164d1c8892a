"""Merged products of experts: the results, parameters and refusals of separate layers."""

from __future__ import annotations

import copy
import gc
import weakref

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import oracle
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from layer_values import decoded, taken
from merged_layers import same
from mlx.utils import tree_flatten
from mlx_lowbit import accelerate, formats, memory, nn, quantize_activations, undo
from small_modules import states, values

switch_layers = pytest.importorskip("mlx_lm.models.switch_layers")

K, N, E = 128, 40, 6
NAMES = ("gate_proj", "up_proj")
X = mx.random.normal((3, 1, 1, K), key=mx.random.key(5))
INDICES = mx.array([[0, 5], [2, 2], [5, 1]], mx.uint32)


class Experts(mlx_nn.Module):
    """Two stacks on one x with one choice of experts, as in mlx-lm's SwitchGLU."""

    def __init__(self, fmt=None, bias=False, dtype=mx.float32, qq=False, **more):
        super().__init__()
        kind = nn.QQSwitchLinear if qq else nn.QuantizedSwitchLinear
        for seed, name in enumerate(NAMES):
            mx.random.seed(seed)
            dense = switch_layers.SwitchLinear(K, N, E, bias=bias)
            if bias:
                dense.bias = mx.random.normal((E, N))
            dense.set_dtype(dtype)
            settings = {} if fmt is None else strategies.format_keywords(fmt)
            self[name] = kind.from_linear(dense, **settings, **more)
        self.freeze()
        mx.eval(self.parameters())

    def __call__(self, x, indices=INDICES, **more):
        return [self[name](x, indices, **more) for name in NAMES]


def merged(**keywords):
    """Merged layers, and a copy with arrays of its own that stay as they are."""
    model = Experts(**keywords)
    apart = copy.deepcopy(model)
    assert [names for _, names, _ in accelerate(model, merge=True).merged] == [NAMES]
    return model, apart


def group(model):
    return model.gate_proj._seat.siblings


def assert_products(got, x, indices, model, seen):
    """got: both layers' [..., 1, N]; seen: x in float64 as they take it, [tokens, K]."""
    for name, y in zip(NAMES, got, strict=True):
        bias = model[name].get("bias")
        each = indices.reshape(len(seen), -1)
        want = oracle.gather(
            seen[:, None],
            decoded(model[name]),
            np.arange(len(seen))[:, None].repeat(each.shape[1], 1),
            each,
            bias=None if bias is None else oracle.f64(bias),
        )
        assert y.shape == (*indices.shape, 1, N) and y.dtype == x.dtype
        oracle.assert_close(y.reshape(want.value.shape), want, K)


@pytest.mark.parametrize("bias", [False, True])
@given(
    shape=st.sampled_from([(1, 1), (3, 2), (2, 2, 3)]),
    order=st.permutations(NAMES),
    seed=strategies.seeds,
)
def test_products_in_any_order(judged_fmt, dtype, bias, shape, order, seed):
    model, apart = merged(fmt=judged_fmt, bias=bias, dtype=dtype)
    rng = np.random.default_rng(seed)
    x = oracle.to_mlx(strategies.activations(rng, (*shape[:-1], 1, 1, K), dtype))
    indices = rng.integers(0, E, shape).astype(np.uint32)
    at, got = mx.array(indices), {}
    for name in order:
        got[name] = model[name](x, at)
        assert (group(model).thread.pending is None) == (name == order[-1])
    seen = oracle.f64(x).reshape(-1, K)
    assert_products([got[name] for name in NAMES], x, indices, apart, seen)


def test_rows_sorted_by_expert(judged_fmt, dtype, count):
    model, apart = merged(fmt=judged_fmt, dtype=dtype)
    rng = np.random.default_rng(1)
    x = oracle.to_mlx(strategies.activations(rng, (24, 1, K), dtype))
    indices = np.sort(rng.integers(0, E, 24)).astype(np.uint32)
    got = model(x, mx.array(indices), sorted_indices=True)
    assert count == ["gather_qmm"]
    assert_products(got, x, indices, apart, oracle.f64(x).reshape(-1, K))


def test_activations_are_quantized_once(qq_fmt, dtype, count):
    model, apart = merged(fmt=qq_fmt, qq=True, dtype=dtype)
    x = X.astype(dtype)
    got = model(x)
    assert count == ["gather_qqmm"]
    assert_products(got, x, np.array(INDICES), apart, taken(x.reshape(-1, K), qq_fmt))


@pytest.mark.parametrize("dtype_of_scales", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("qq", [False, True])
def test_global_scales(qq, dtype_of_scales, count):
    model = Experts(fmt=formats.get("nvfp4"), qq=qq, global_scale=True)
    for name, size in zip(NAMES, (1, 10), strict=True):
        factors = size * mx.array([1.0, 0.1, 10, 3, 1, 2])
        model[name].global_scale = (model[name].global_scale * factors).astype(dtype_of_scales)
    apart = copy.deepcopy(model)
    assert len(accelerate(model, merge=True).merged) == 1
    same(model(X), apart(X))
    assert count == ["gather_qqmm" if qq else "gather_qmm"] * 3
    assert model.up_proj.global_scale.dtype == dtype_of_scales
    for each in (model, apart):
        each.up_proj.global_scale = each.up_proj.global_scale * 2
    same(model(X), apart(X))


def test_x_with_more_dimensions_than_indices():
    model, apart = merged()
    x = mx.random.normal((2, 3, 4, K))  # pairs of (2, 3) and (3,), four rows each
    same(model(x, mx.array([1, 0, 5])), apart(x, mx.array([1, 0, 5])))
    x = mx.random.normal((4, K))
    same(model(x, INDICES), apart(x, INDICES))


@pytest.mark.parametrize("dtype_of_indices", [mx.uint8, mx.int32, mx.uint32, mx.int64, mx.uint64])
def test_indices_of_every_dtype(dtype_of_indices):
    model, apart = merged()
    indices = INDICES.astype(dtype_of_indices)
    same(model(X, indices), apart(X, indices))


def test_parameters_keep_names_bits_and_files(judged_fmt, tmp_path):
    model = mlx_nn.Sequential(*(switch_layers.SwitchGLU(K, 128, E, bias=True) for _ in range(2)))
    mlx_nn.quantize(model, **strategies.format_keywords(judged_fmt))
    x = X.reshape(3, K)

    def forward():
        return [values(layer(x, INDICES)) for layer in model.layers]

    before, tree = forward(), states(model)
    stored = {name: np.array(a) for name, a in tree_flatten(model.parameters())}
    report = accelerate(model, merge=True)
    assert [(path, names) for path, names, _ in report.merged] == [
        (f"layers.{i}", NAMES) for i in range(2)
    ]
    model.save_weights(str(tmp_path / "merged.safetensors"))
    saved = mx.load(str(tmp_path / "merged.safetensors"))
    for held in (saved, dict(tree_flatten(model.parameters()))):
        assert held.keys() == stored.keys()
        assert all(np.array_equal(np.array(a), stored[name]) for name, a in held.items())
    undo(model)
    assert [s[1:] for s in states(model).values()] == [s[1:] for s in tree.values()]
    assert all(map(np.array_equal, forward(), before))


def test_no_copy_now_or_later():
    """Each layer's stack is a block of memory of its own, which no reader has to copy."""
    model = Experts()
    for name in NAMES:
        dense = switch_layers.SwitchLinear(K, 1024, E, bias=False)
        model[name] = nn.QuantizedSwitchLinear.from_linear(dense)
    mx.eval(model.parameters())
    gc.collect()
    before = memory.get_active_memory()
    size = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert accelerate(model, merge=True).merged == [("", NAMES, size)]
    mx.synchronize()
    assert memory.get_active_memory() - before < size // 20

    def apart():
        group(model).limit = 0
        return model(X)

    for products in (lambda: model(X), apart, lambda: undo(model) and model(X)):
        memory.reset_peak_memory()
        mx.eval(products())
        assert memory.get_peak_memory() - before < size // 5


def replace(layer):
    layer.scales = layer.scales * 2


def in_place(layer):
    layer.scales *= 2


def bias_in_place(layer):
    layer.bias[0] = 7.0


def load(layer):
    layer.load_weights([(name, mx.array(2 * value)) for name, value in layer.items()])


@pytest.mark.parametrize("change", [replace, in_place, bias_in_place, load])
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_parameter_is_noticed(change, name):
    model, apart = merged(bias=True)
    twin = weakref.ref(group(model).operands["w"])
    model(X), change(model[name]), change(apart[name])
    same(model(X), apart(X))
    assert twin() is None and accelerate(model, merge=True).merged
    same(model(X), apart(X))


def test_other_indices_and_indices_changed_in_place_are_noticed():
    model, apart = merged()
    other = mx.array([[1, 1], [0, 4], [3, 3]], mx.uint32)
    got = [model.gate_proj(X, INDICES), model.up_proj(X, other)]
    same(got, [apart.gate_proj(X, INDICES), apart.up_proj(X, other)])
    indices = mx.array(INDICES)
    got = [model.gate_proj(X, indices)]
    indices += mx.array([[1, 0], [0, 0], [0, 1]], mx.uint32)
    got.append(model.up_proj(X, indices))
    same(got, [apart.gate_proj(X, INDICES), apart.up_proj(X, indices)])


def test_more_rows_than_pay_are_separate(count):
    model, apart = merged()
    indices = mx.zeros((8 * E + 1, 1), mx.uint32)
    for rows, products in ((8 * E, 1), (8 * E + 1, 2)):
        x = mx.random.normal((rows, 1, 1, K))
        count.clear()
        got = model(x, indices[:rows])
        assert count == ["gather_qmm"] * products
        same(got, apart(x, indices[:rows]))


def test_an_expert_that_does_not_exist():
    """One of the layers gives NaN where both do apart, and so does what is made of both."""
    model, apart = merged()
    for indices in ([[0, 5], [6, 2], [11, 12]], [[0, 5], [-1, 2], [-6, -7]]):
        indices = mx.array(indices, mx.int32)
        exact = apart(X, indices)
        got, want = (values(a * b) for a, b in (model(X, indices), exact))
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
        inside = ~np.isnan(want)
        assert inside.sum() == 3 * N
        np.testing.assert_allclose(got[inside], want[inside], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "indices"),
    [
        (mx.zeros((3, 1, 1, K - 32)), INDICES),
        (mx.zeros((3, 1, 1, K), mx.int32), INDICES),
        (mx.zeros((4, 1, 1, K)), INDICES),
        (mx.zeros((K,)), INDICES),
        (X, INDICES.astype(mx.float32)),
        (X, INDICES > 1),
        ([1.0], INDICES),
        (None, INDICES),
    ],
)
def test_refusals_are_those_of_the_layer(x, indices):
    messages = []
    for model in merged():
        with pytest.raises((ValueError, TypeError)) as error:
            model.up_proj(x, indices)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


class Own(nn.QuantizedSwitchLinear):
    """A class that may do anything to x before its product."""


@pytest.mark.parametrize("case", ["experts", "rows", "bits", "bias", "extended", "shared"])
def test_layers_that_do_not_belong_together(case):
    model = Experts()
    sizes = {"experts": (K, N, E + 2), "rows": (K, N + 8, E)}.get(case, (K, N, E))
    dense = switch_layers.SwitchLinear(*sizes, bias=case == "bias")
    kind = Own if case == "extended" else nn.QuantizedSwitchLinear
    holder = mlx_nn.Module()
    holder.experts = model
    if case == "shared":
        holder.others = [model.up_proj]
    else:
        model.up_proj = kind.from_linear(dense, bits=8 if case == "bits" else 4)
    assert accelerate(holder, merge=True).merged == []


def test_quantized_activations_end_a_group(qq_fmt, count):
    model, apart = merged(fmt=qq_fmt)
    quantize_activations(model), quantize_activations(apart)
    same(model(X), apart(X))
    assert count == ["gather_qqmm"] * 4
    assert len(accelerate(model, merge=True).merged) == 1
    same(model(X), apart(X))
    assert count == ["gather_qqmm"] * 7


@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
def test_compile(names):
    model, apart = merged()

    def parts(model):
        return mx.compile(lambda x, at: [model[name](x * 2, at + 0) for name in names])

    compiled, plain = parts(model), parts(apart)
    for tokens in (1, 3, 1):
        x, at = mx.random.normal((tokens, 1, 1, K)), INDICES[:tokens]
        same(compiled(x, at), plain(x, at))
        same(model(x, at), apart(x, at))


def test_gradients(count):
    model, apart = merged(bias=True)

    def loss(model):
        return lambda x: sum((y * y).sum() for y in model(mx.sin(x)))

    same([mx.grad(loss(model))(X)], [mx.grad(loss(apart))(X)])
    assert count == ["gather_qmm"] * 3
    grads = []
    for each in (model, apart):
        each.train()
        each.unfreeze(keys=["scales", "biases", "bias"])
        step = mlx_nn.value_and_grad(each, lambda model, x: loss(model)(x))
        grads.append(dict(tree_flatten(step(each, X)[1])))
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 6
    same(grads[0].values(), grads[1].values())
    same(model(X), apart(X))


def test_vmap():
    model, apart = merged()
    x = mx.random.normal((5, 3, 1, 1, K))
    at = mx.array(np.random.default_rng(0).integers(0, E, (5, 3, 2)))
    same(mx.vmap(model)(x, at), mx.vmap(apart)(x, at))
    same(mx.vmap(model, in_axes=(0, None))(x, at[0]), mx.vmap(apart, in_axes=(0, None))(x, at[0]))
    same(model(X), apart(X))
