"""The self-test of doctor: right kernels pass, and a fault in any op is found and named."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import ops, selftest

OPS = ("quantized_matmul", "gather_qmm", "qqmm", "gather_qqmm", "dequantize")


def test_kernels_pass(fmt):
    results = list(selftest.run((fmt,)))
    assert {r.dtype for r in results} == {"float32", "float16", "bfloat16"}
    activations = {"qqmm", "gather_qqmm"} if fmt.mode in ops.ACTIVATION_MODES else set()
    expected = {"quantize", "dequantize", "quantized_matmul", "gather_qmm"} | activations
    assert {r.op for r in results} == expected
    assert all(r.ok for r in results), [r for r in results if not r.ok]


def test_decoding_is_the_oracles(fmt, rng):
    w = strategies.random_weight(rng, fmt, 7, 3 * fmt.group_size, mx.float32)
    got = selftest.decode(fmt, *strategies.weight_arrays(w)).reshape(7, -1)
    np.testing.assert_array_equal(got, oracle.decode(fmt, w))


@pytest.mark.parametrize("op", OPS)
def test_a_wrong_op_is_found(op, qq_fmt, monkeypatch):
    right = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *a, **k: right(*a, **k) * 1.02)
    results = list(selftest.run((qq_fmt,), (mx.float32,)))
    assert [r.op for r in results if not r.ok] == [op]


def test_one_wrong_row_is_found(qq_fmt, monkeypatch):
    right = ops.quantized_matmul

    def wrong(x, *a, **k):
        y = right(x, *a, **k)
        return mx.where(mx.arange(y.shape[0])[:, None] == 69, 0, y)

    monkeypatch.setattr(ops, "quantized_matmul", wrong)
    results = list(selftest.run((qq_fmt,), (mx.bfloat16,)))
    assert [r.op for r in results if not r.ok] == ["quantized_matmul"]


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_an_op_that_raises_is_a_result(error, monkeypatch):
    def fails(*a, **k):
        raise error("the compiler said no")

    monkeypatch.setattr(ops, "gather_qmm", fails)
    results = list(selftest.run(selftest.FORMATS[:1], (mx.float32,)))
    (failed,) = [r for r in results if not r.ok]
    assert failed.op == "gather_qmm" and failed.reason == "the compiler said no"


def test_nan_is_no_success(monkeypatch):
    right = ops.gather_qmm
    monkeypatch.setattr(ops, "gather_qmm", lambda *a, **k: right(*a, **k) * float("nan"))
    results = list(selftest.run(selftest.FORMATS[:1], (mx.float32,)))
    assert [r.op for r in results if not r.ok] == ["gather_qmm"]
