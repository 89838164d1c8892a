"""Merged products: the same results and parameters as separate layers, whatever happens to them."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st
from layer_values import assert_product, decoded, taken
from merged_layers import NAMES, ROWS, Attention, K, X, group, merged, same
from mlx.utils import tree_flatten
from mlx_lowbit import accelerate, memory, nn, quantize_activations, undo
from mlx_lowbit.nn import merge
from oracle import to_numpy
from small_modules import states, values


@pytest.mark.parametrize("bias", [False, True])
@given(rows=st.sampled_from([(1,), (1, 1), (3,), (2, 5), (0,)]), order=st.permutations(NAMES))
def test_products_in_any_order(judged_fmt, dtype, bias, rows, order):
    model, apart = merged(fmt=judged_fmt, bias=bias, dtype=dtype)
    group(model).limit = 10 * K
    x = mx.random.normal((*rows, K)).astype(dtype)
    for name in order:
        y = model[name](x)
        assert group(model).thread.pending is None or name != order[-1]
        assert y.shape == (*rows, ROWS[name]) and y.dtype == apart[name](x).dtype
        weight, own = decoded(apart[name]), apart[name].get("bias")
        if y.size:
            assert_product(y, to_numpy(x).astype(np.float64), weight, own)


def test_one_product_for_three_layers(count):
    model, _ = merged()
    for _ in range(5):
        model(mx.random.normal((1, K)))
    assert count == ["quantized_matmul"] * 5


def test_activations_are_quantized_once(qq_fmt, count):
    model, apart = merged(fmt=qq_fmt, layer=nn.QQLinear, bias=True)
    got = model(X)
    assert count == ["qqmm"]
    for name, y in zip(NAMES, got, strict=True):
        assert_product(y, taken(X, qq_fmt), decoded(apart[name]), apart[name].bias)


def test_parameters_keep_names_bits_and_files(judged_fmt, tmp_path):
    model = Attention(fmt=judged_fmt, bias=True)
    before, tree = values(mx.concatenate(model(X), -1)), states(model)
    stored = {name: np.array(a) for name, a in tree_flatten(model.parameters())}
    accelerate(model, merge=True)
    model.save_weights(str(tmp_path / "merged.safetensors"))
    saved = mx.load(str(tmp_path / "merged.safetensors"))
    for held in (saved, dict(tree_flatten(model.parameters()))):
        assert held.keys() == stored.keys()
        assert all(np.array_equal(np.array(a), stored[name]) for name, a in held.items())
        assert all(np.array(a).dtype == stored[name].dtype for name, a in held.items())
    undo(model)
    assert [s[1:] for s in states(model).values()] == [s[1:] for s in tree.values()]
    assert all(layer._seat is None for layer in (nn.QuantizedLinear, nn.QQLinear))
    assert not any(merge.SEAT in vars(model[name]) for name in NAMES)
    assert np.array_equal(values(mx.concatenate(model(X), -1)), before)


def test_a_model_of_mlx_lm(judged_fmt, tmp_path):
    pytest.importorskip("mlx_lm")
    from mlx_lm.models import llama
    from mlx_lm.utils import load_model, save_model

    config = {
        "model_type": "llama", "hidden_size": 128, "num_hidden_layers": 2, "vocab_size": 160,
        "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    }  # fmt: skip
    model = llama.Model(llama.ModelArgs.from_dict(config))
    mlx_nn.quantize(model, **strategies.format_keywords(judged_fmt))
    accelerate(model, merge=False)
    before = [np.array(model(mx.array([[3]])).astype(mx.float32))]
    report = accelerate(model, merge=True)
    assert [names for _, names, _ in report.merged] == [NAMES, ("gate_proj", "up_proj")] * 2
    assert [path for path, _, _ in report.merged][:2] == [
        f"model.layers.0.{name}" for name in ("self_attn", "mlp")
    ]
    after = [np.array(model(mx.array([[3]])).astype(mx.float32))]
    assert np.linalg.norm(after[0] - before[0]) < 1e-2 * np.linalg.norm(before[0])
    save_model(tmp_path, model)
    settings = strategies.format_keywords(judged_fmt)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization": settings}))
    loaded, _ = load_model(tmp_path)
    accelerate(loaded, merge=False)
    assert np.array_equal(np.array(loaded(mx.array([[3]])).astype(mx.float32)), before[0])


def replace(layer):
    layer.scales = layer.scales * 2


def in_place(layer):
    layer.scales *= 2


def bias_in_place(layer):
    layer.bias[0] = 7.0


def cast(layer):
    layer.set_dtype(mx.bfloat16)


def load(layer):
    layer.load_weights([(name, mx.array(2 * value)) for name, value in layer.items()])


@pytest.mark.parametrize("change", [replace, in_place, bias_in_place, cast, load])
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_parameter_is_noticed(change, name):
    model, apart = merged(bias=True)
    twin = weakref.ref(group(model).operands["w"])
    model(X), change(model[name]), change(apart[name])
    same(model(X), apart(X))
    assert twin() is None and not accelerate(model, merge=False).merged
    assert bool(accelerate(model, merge=True).merged) or change is cast
    same(model(X), apart(X))


def test_an_input_changed_in_place_is_noticed():
    model, apart = merged()
    x = mx.array(X)
    q = model.q_proj(x)
    x += 1
    same([q, model.k_proj(x), model.v_proj(x)], [apart.q_proj(X), *apart(X + 1)[1:]])


def test_a_result_changed_in_place_stays_with_its_caller():
    model, apart = merged()
    for name in NAMES[:2]:  # the layer that computes the product, and one that is served
        y = model[name](X)
        y += 1
    same(
        [model.k_proj(X), model.q_proj(X), model.v_proj(X)], [apart[f"{n}_proj"](X) for n in "kqv"]
    )


def test_more_rows_than_pay_are_separate(count):
    model, apart = merged()
    x = mx.random.normal((1, 2, K))
    same(model(x), apart(x))
    assert count == ["quantized_matmul"] * 6 and group(model).operands is not None


def test_nothing_outlives_its_input():
    model, _ = merged()
    x = mx.random.normal((1, K))
    mx.eval(model.q_proj(x))
    pending = group(model).thread.pending
    result = weakref.ref(pending.parts[1])
    assert result() is not None
    del x
    gc.collect()
    assert result() is None and pending.x is None


def test_layers_that_are_called_alone_go_separate_ways(count):
    model, apart = merged()
    for _ in range(4):
        x = mx.random.normal((1, K))
        y = model.q_proj(x)
    assert model.q_proj._seat.siblings is None
    count.clear()
    same([y, *model(x)], [apart.q_proj(x), *apart(x)])
    assert len(count) == 7


def test_no_second_copy():
    model = Attention(dtype=mx.bfloat16)
    for name in NAMES:
        model[name] = mlx_nn.QuantizedLinear.from_linear(mlx_nn.Linear(K, 4096, bias=False))
    mx.eval(model.parameters())
    gc.collect()
    before = memory.get_active_memory()
    size = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    report = accelerate(model, merge=True)
    assert report.merged == [("", NAMES, size)]
    assert memory.get_active_memory() - before < size // 20
    for again in (lambda: model(X), lambda: undo(model) and model(X)):
        memory.reset_peak_memory()
        mx.eval(again())
        assert memory.get_peak_memory() - before < size // 5


class Own(mlx_nn.QuantizedLinear):
    """A class that may do anything to x before its product."""


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("shared", NAMES[:2]),
        ("bits", NAMES[:2]),
        ("dims", NAMES[:2]),
        ("bias", NAMES[:2]),
        ("wrapped", NAMES[:2]),
        ("extended", ()),
        ("global_scale", ()),
    ],
)
def test_layers_that_do_not_belong_together(case, expected, nv_fmt):
    model = Attention(fmt=nv_fmt if case == "global_scale" else None)
    holder = mlx_nn.Module()
    holder.attention = model
    quantized = mlx_nn.QuantizedLinear.from_linear
    if case == "shared":
        holder.others = [{"tied": model.v_proj}]
    elif case == "bits":
        model.v_proj = quantized(mlx_nn.Linear(K, 64, bias=False), bits=8)
    elif case == "dims":  # as many words and scales a row as 4 bits of twice the width
        model.v_proj = quantized(mlx_nn.Linear(K // 2, 64, bias=False), bits=8, group_size=32)
        assert model.v_proj.weight.shape[1:] == model.q_proj.weight.shape[1:]
    elif case == "bias":
        model.v_proj = quantized(mlx_nn.Linear(K, 64))
    elif case == "wrapped":
        model.v_proj = mlx_nn.Sequential(model.v_proj)
    for name in NAMES:
        if case == "extended":
            model[name] = Own.from_linear(mlx_nn.Linear(K, 64))
        elif case == "global_scale":
            model[name].global_scale = mx.array(2688.0)
    report = accelerate(holder, merge=True)
    groups = [("attention", expected)] if expected else []
    assert [(path, names) for path, names, _ in report.merged] == groups


def test_copies_and_other_layers_of_the_same_arrays(count):
    model, apart = merged()
    twin, expected = copy.deepcopy(model), apart(X)
    count.clear()
    same([*twin(X), *model(X)], [*expected, *expected])
    assert count == ["quantized_matmul"] * 2
    twin.q_proj.scales = twin.q_proj.scales * 2
    same(model(X), apart(X))
    assert nn.QuantizedLinear.from_quantized(model.k_proj)._seat is None
    assert pickle.loads(pickle.dumps(model.q_proj._seat)) is None


def test_quantized_activations_end_a_group(qq_fmt, count):
    model, apart = merged(fmt=qq_fmt)
    quantize_activations(model), quantize_activations(apart)
    same(model(X), apart(X))
    assert count == ["qqmm"] * 6
    assert len(accelerate(model, merge=True).merged) == 1
    same(model(X), apart(X))
    assert count == ["qqmm"] * 10


def test_merge_decides():
    model = Attention()
    assert accelerate(model).merged == [] or mx.default_device().type == mx.gpu
    report = accelerate(model, merge=True)
    assert accelerate(model, merge=True).merged == [] and len(report.merged) <= 1
    assert group(model).operands is not None
    accelerate(model, merge=None)
    assert model.q_proj._seat is not None
    accelerate(model, merge=False)
    assert model.q_proj._seat is None
    with pytest.raises(TypeError, match=r"^merge: expected True, False or None, got 1$"):
        accelerate(model, merge=1)


def test_the_report_lists_groups():
    model = mlx_nn.Sequential(Attention(), Attention())
    lines = str(accelerate(model, merge=True)).splitlines()
    size = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    assert ["2", "layers.*", "merged", *NAMES] in [line.split() for line in lines]
    assert lines[-1].endswith(f"; 2 merged products over {size} bytes")


@pytest.mark.parametrize("x", [mx.zeros((1, K - 32)), mx.zeros((1, K), mx.int32), [1.0], None])
def test_refusals_are_those_of_the_layer(x):
    messages = []
    for model in merged():
        with pytest.raises((ValueError, TypeError)) as error:
            model.k_proj(x)
        messages.append(str(error.value))
    assert messages[0] == messages[1]
