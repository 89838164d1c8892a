"""A product that holds its weights and cuts its result: the bits of quantized_matmul."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lowbit import _ext, formats, ops
from oracle import to_numpy

N, K = 96, 256


def operands(fmt, dtype, bias):
    w = mx.random.normal((N, K)).astype(dtype)
    keywords = {"mode": fmt.mode, "bits": fmt.bits, "group_size": fmt.group_size}
    w_q, scales, biases = ops.quantize(w, **keywords)
    given = mx.random.normal((N,)).astype(dtype) if bias else None
    mx.eval([a for a in (w_q, scales, biases, given) if a is not None])
    return (w_q, scales, biases, given), keywords


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1, 1), (5,), (2, 3)])
def test_parts_are_columns(judged_fmt, dtype, rows, bias):
    (w, scales, biases, given), keywords = operands(judged_fmt, dtype, bias)
    x = mx.random.normal((*rows, K)).astype(dtype)
    whole = to_numpy(ops.quantized_matmul(x, w, scales, biases, bias=given, **keywords))
    shapes = [(*rows, *columns) for columns in ((64,), (3, 1, 8), (8,))]
    # Once with the weights as the only owner of their memory, as after a model has gone.
    parts = _ext.fixed_product(x, w, scales, biases, given, judged_fmt.id, shapes)
    del w, scales, biases, given
    if dtype == mx.float32 and mx.default_device() == mx.gpu:
        assert not parts  # its weights are decoded before the product
        return
    assert [p.shape for p in parts] == shapes
    for part, expected in zip(parts, np.split(whole, [64, 88], axis=-1), strict=True):
        expected = expected.reshape(part.shape)
        assert part.dtype == dtype and np.array_equal(to_numpy(part), expected, equal_nan=True)
        assert np.array_equal(to_numpy(part * 1), expected, equal_nan=True)


def test_one_row_takes_any_shape_and_so_does_one_part(judged_fmt):
    (w, scales, biases, _), keywords = operands(judged_fmt, mx.bfloat16, False)
    x = mx.random.normal((1, 1, K)).astype(mx.bfloat16)
    whole = to_numpy(ops.quantized_matmul(x, w, scales, biases, **keywords)).reshape(-1)
    arrays = x, w, scales, biases, None, judged_fmt.id
    a, b = _ext.fixed_product(*arrays, [(1, 4, 1, 16), (2, 16)])
    assert np.array_equal(to_numpy(a).reshape(-1), whole[:64]) and a.shape == (1, 4, 1, 16)
    assert np.array_equal(to_numpy(b).reshape(-1), whole[64:])
    x = mx.repeat(x, 3, 1)
    (y,) = _ext.fixed_product(x, *arrays[1:], [(3, 8, 12)])
    whole = to_numpy(ops.quantized_matmul(x, w, scales, biases, **keywords))
    assert np.array_equal(to_numpy(y).reshape(3, -1), whole.reshape(3, -1))


def test_what_it_does_not_take():
    usual = formats.get("affine", 4, 64)
    (w, scales, biases, _), _ = operands(usual, mx.bfloat16, False)
    x = mx.random.normal((2, K)).astype(mx.bfloat16)
    take = [(2, N)]
    assert _ext.fixed_product(x, w, scales, biases, None, usual.id, take)
    assert not _ext.fixed_product(x.astype(mx.float16), w, scales, biases, None, usual.id, take)
    assert not _ext.fixed_product(x, w, scales * 1, biases, None, usual.id, take)
    for wrong in ([(2, N - 1)], [(1, N)], [(2, 64), (1, 2, N)], [(4, 32), (2, 32)], []):
        with pytest.raises(ValueError, match=r"^\[fixed_product\] "):
            _ext.fixed_product(x, w, scales, biases, None, usual.id, wrong)
    with pytest.raises(ValueError, match=r"^\[fixed_product\] the last dimension of x"):
        _ext.fixed_product(x[:, 1:], w, scales, biases, None, usual.id, take)
