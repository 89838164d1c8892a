"""What a layer stores and what it should compute, through the oracle."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as mlx_nn
import oracle
from mlx.utils import tree_flatten
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
