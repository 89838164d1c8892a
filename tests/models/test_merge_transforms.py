"""Merged products in threads and under MLX's transformations."""

from __future__ import annotations

import threading

import mlx.core as mx
import mlx.nn as mlx_nn
import pytest
from merged_layers import NAMES, K, X, group, merged, same, squares
from mlx.utils import tree_flatten
from mlx_lowbit import accelerate
from small_modules import values


def test_threads():
    model, apart = merged()
    xs = [mx.random.normal((1, K), key=mx.random.key(i)) for i in range(4)]
    expected = [[values(y) for y in apart(x)] for x in xs]
    barrier, wrong = threading.Barrier(len(xs)), []

    def step(x):
        for name in NAMES:
            barrier.wait(60)  # every thread has called the layer before this one
            yield model[name](x)

    def steps(x, want):
        try:
            with mx.stream(mx.new_stream(mx.default_device())):
                for _ in range(20):
                    same(list(step(x)), [mx.array(y) for y in want])
            assert group(model).thread.pending is None
        except Exception as error:
            wrong.append(error)
            barrier.abort()

    threads = [threading.Thread(target=steps, args=pair) for pair in zip(xs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and group(model).wasted == 0 and group(model).operands is not None


@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:]])
def test_compile(names):
    """Layers that are not called in a trace leave a product behind, which must not come out."""
    model, apart = merged()

    def parts(model):
        return mx.compile(lambda x: [model[name](x * 2) for name in names])

    compiled, plain = parts(model), parts(apart)
    for shape in [(1, K), (1, 1, K), (3, K), (1, K)]:
        x = mx.random.normal(shape)
        same(compiled(x), plain(x))
        same(model(x), apart(x))


def test_compile_around_a_constant_input():
    model, apart = merged()
    compiled = mx.compile(lambda y: model.q_proj(X) * y)
    for y in (mx.array(2.0), mx.array(3.0)):
        first = compiled(y)
        same([first, *model(X)[1:]], [apart.q_proj(X) * y, *apart(X)[1:]])
    model.q_proj(X)
    other = mx.compile(lambda y: model.k_proj(X) * y)
    for y in (mx.array(2.0), mx.array(3.0)):
        same([other(y), model.v_proj(X)], [apart.k_proj(X) * y, apart.v_proj(X)])


def test_compile_with_captured_parameters():
    model, apart = merged()
    compiled = mx.compile(lambda x: model(x), inputs=[model.state])
    same(compiled(X), apart(X))
    assert group(model).operands is not None  # the trace put the parameters back
    model.k_proj.scales = model.k_proj.scales * 2
    apart.k_proj.scales = apart.k_proj.scales * 2
    same(compiled(X), apart(X))
    same(model(X), apart(X))


def test_gradients_of_the_input(count):
    model, apart = merged()

    def loss(model):
        return lambda x: squares(model, mx.sin(x))

    model.q_proj(X)
    for _ in range(2):
        same([mx.grad(loss(model))(X)], [mx.grad(loss(apart))(X)])
        same(model(X), apart(X))
    count.clear()
    mx.grad(loss(model))(X)
    assert count == ["quantized_matmul"]
    same(
        [mx.compile(mx.grad(loss(model)))(X), mx.jvp(loss(model), [X], [X])[1][0]],
        [mx.grad(loss(apart))(X), mx.jvp(loss(apart), [X], [X])[1][0]],
    )


def test_gradients_of_parameters():
    model, apart = merged(bias=True)
    grads = []
    for each in (model, apart):
        each.train()
        each.unfreeze(keys=["scales", "biases", "bias"])
        grads.append(dict(tree_flatten(mlx_nn.value_and_grad(each, squares)(each)[1])))
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) == 9
    same(grads[0].values(), grads[1].values())
    same(model(X), apart(X))


def test_vmap():
    model, apart = merged()
    x = mx.random.normal((5, 1, K))
    for leftover in (False, True):
        same(mx.vmap(model)(x), mx.vmap(apart)(x))
        y = mx.vmap(lambda t: model.q_proj(X) + t)(x[..., :64])
        same([y], [apart.q_proj(X) + x[..., None, :64]])
        if leftover:
            same([mx.vmap(model.q_proj)(x)], [mx.vmap(apart.q_proj)(x)])
        same(model(X), apart(X))


def test_lora_on_merged_layers(count):
    lora = pytest.importorskip("mlx_lm.tuner.lora")
    model, apart = merged()
    for each in (model, apart):
        for name in NAMES:
            mx.random.seed(1)
            each[name] = lora.LoRALinear.from_base(each[name], r=4)
            each[name].lora_b = mx.random.normal(each[name].lora_b.shape)
    same(model(X), apart(X))
    first, second = (
        dict(tree_flatten(mlx_nn.value_and_grad(each, squares)(each)[1])) for each in (model, apart)
    )
    assert len(first) == 6 and first.keys() == second.keys()
    same(first.values(), second.values())
    assert accelerate(apart, merge=True).merged == []
    count.clear()
    model(X)
    assert count == ["quantized_matmul"]
