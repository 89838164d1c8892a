"""Figures of memory: results of kernels are among them, on every backend."""

from __future__ import annotations

import gc

import mlx.core as mx
import pytest
from mlx_lowbit import memory, ops

COLUMNS, K = 4096, 64
# On CUDA results from 2 MiB on have memory of MLX's, and the others memory of this package's.
sizes = pytest.mark.parametrize("rows", [64, 256], ids=["1 MiB", "4 MiB"])


def operands(rows: int) -> tuple[mx.array, dict]:
    w, scales, biases = mx.quantize(mx.random.normal((COLUMNS, K)), 64, 4)
    x = mx.random.normal((rows, K))
    mx.eval(x, w, scales, biases)
    return x, {"w": w, "scales": scales, "biases": biases, "group_size": 64, "bits": 4}


def active() -> int:
    gc.collect()
    mx.synchronize()
    return memory.get_active_memory()


@sizes
def test_results_are_counted(rows):
    x, keywords = operands(rows)
    size, before = 4 * rows * COLUMNS, active()
    memory.reset_peak_memory()
    y = ops.quantized_matmul(x, **keywords)
    mx.eval(y)
    assert size <= active() - before < 1.3 * size
    assert memory.get_peak_memory() >= before + size
    del y
    assert active() - before < size // 10
    assert memory.get_cache_memory() >= size or mx.default_device().type == mx.cpu
    assert memory.get_peak_memory() >= before + size
    memory.reset_peak_memory()
    mx.eval(ops.quantized_matmul(x[:1], **keywords))
    assert before <= memory.get_peak_memory() < before + size // 2


@sizes
def test_a_peak_has_what_was_held_at_once(rows):
    """Results of kernels and arrays of MLX's own, each twice and freed between."""
    x, keywords = operands(rows)
    size, before = 4 * rows * COLUMNS, active()
    memory.reset_peak_memory()
    for _ in range(2):
        own = mx.random.normal((rows, COLUMNS))
        mx.eval(own)
        y = ops.quantized_matmul(x, **keywords)
        mx.eval(y)
        del own, y
        active()
    assert 2 * size <= memory.get_peak_memory() - before < 3 * size


def test_who_reads_a_large_result_last_writes_there():
    x, keywords = operands(256)
    size, before = 4 * 256 * COLUMNS, active()
    memory.reset_peak_memory()
    y = mx.negative(ops.quantized_matmul(x, **keywords))
    mx.eval(y)
    active()
    assert size <= memory.get_peak_memory() - before < 1.5 * size
    assert mx.array_equal(-y, ops.quantized_matmul(x, **keywords)).item()
