"""Small modules that keep layers in every place a module can, and what they hold."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np

K = 128
X = mx.random.normal((3, K), key=mx.random.key(5))


def quantized(mode="affine", bias=True, **keywords):
    return mlx_nn.QuantizedLinear.from_linear(mlx_nn.Linear(K, K, bias=bias), mode=mode, **keywords)


class Calls(mlx_nn.QuantizedLinear):
    """Computes its product itself."""

    def __call__(self, x):
        return mx.quantized_matmul(x, self.weight, self.scales, self.biases)


class Splits(mlx_nn.QuantizedLinear):
    """Has the product computed by its base class."""

    halves = 2

    def __call__(self, x):
        return super().__call__(x).split(self.halves, axis=-1)


class Renamed(mlx_nn.QuantizedLinear):
    def parts(self):
        return 2


class Wrapper(mlx_nn.Module):
    """Layers in every place a module can keep them."""

    def __init__(self, mode="affine"):
        super().__init__()
        self.embed = mlx_nn.QuantizedEmbedding(K, K, mode=mode)
        self.head = quantized(mode)
        self.tied = self.head
        self.stack = [quantized(mode), [quantized(mode, bias=False)]]
        self.named = {"a": quantized(mode), "b": {"c": quantized(mode)}}
        self.fixed = (quantized(mode), mlx_nn.ReLU())
        self._hidden = quantized(mode)
        self.norm = mlx_nn.RMSNorm(K)

    def layers(self):
        yield from (self.head, self.stack[0], self.stack[1][0], self.named["a"])
        yield from (self.named["b"]["c"], self.fixed[0], self._hidden)

    def __call__(self, x):
        for layer in self.layers():
            x = self.norm(layer(x))
        return self.embed.as_linear(x) + self.embed(mx.array([1, 2, 3])).astype(x.dtype)


PATHS = ["embed", "head", "stack.0", "stack.1.0", "named.a", "named.b.c", "fixed.0", "_hidden"]


def values(y):
    return np.array(y.astype(mx.float32))


def state(module):
    """Everything a module holds, arrays and submodules by identity."""
    own = {name: id(value) for name, value in module.items() if not isinstance(value, (list, dict))}
    return own, set(module._no_grad), module.training, type(module)


def states(model):
    return {path: state(module) for path, module in model.named_modules()}
