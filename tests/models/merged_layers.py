"""Three layers that share a product, the same ones apart, and what both must agree on."""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import strategies
from mlx_lowbit import accelerate
from small_modules import values

K = 256
NAMES = ("q_proj", "k_proj", "v_proj")
ROWS = {"q_proj": 64, "k_proj": 32, "v_proj": 48}
X = mx.random.normal((1, 1, K), key=mx.random.key(5))


class Attention(mlx_nn.Module):
    """Three layers on one x, frozen, without a bias unless asked for one."""

    def __init__(self, fmt=None, bias=False, dtype=mx.float32, layer=mlx_nn.QuantizedLinear):
        super().__init__()
        settings = {} if fmt is None else strategies.format_keywords(fmt)
        for name in NAMES:
            dense = mlx_nn.Linear(K, ROWS[name], bias=bias)
            if bias:
                dense.bias = mx.random.normal(dense.bias.shape)
            dense.set_dtype(dtype)
            self[name] = layer.from_linear(dense, **settings)
        self.freeze()
        mx.eval(self.parameters())

    def __call__(self, x):
        return [self[name](x) for name in NAMES]


def merged(**keywords):
    """A merged model, and a copy of it with arrays of its own that stays as it is."""
    model = Attention(**keywords)
    accelerate(model, merge=False)
    apart = copy.deepcopy(model)
    assert len(accelerate(model, merge=True).merged) == 1
    return model, apart


def group(model):
    return model.q_proj._seat.siblings


def same(got, expected, bound=1e-5):
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = values(a), values(b)
        assert np.linalg.norm(a - b) <= bound * np.linalg.norm(b)


def squares(model, x=X):
    return sum((y * y).sum() for y in model(x))
