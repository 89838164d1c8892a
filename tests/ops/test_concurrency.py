"""Several streams, several Python threads, and a forked child: the same results as alone."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import formats, ops
from strategies import Problem

SIZES = [(1, 257, 1024), (6, 130, 512), (33, 70, 768), (130, 65, 256)]


def problems(fmt, dtype=mx.bfloat16) -> list[Problem]:
    return [Problem(fmt, dtype, M, N, K, seed=M, with_bias=True) for M, N, K in SIZES]


def product(problem: Problem, stream: mx.Stream | None = None) -> np.ndarray:
    x, words, scales, biases = problem.arrays()
    y = ops.quantized_matmul(x, words, scales, biases, stream=stream, **problem.keywords())
    return oracle.bits_of(oracle.to_numpy(y))


def test_two_streams(judged_fmt):
    """Work of two streams interleaved: each result equals that of the default stream."""
    streams = [mx.new_stream(mx.default_device()) for _ in range(2)]
    cases = problems(judged_fmt)
    want = [product(p) for p in cases]
    pending = []
    for repeat in range(3):
        for i, p in enumerate(cases):
            x, words, scales, biases = p.arrays()
            y = ops.quantized_matmul(
                x, words, scales, biases, stream=streams[(i + repeat) % 2], **p.keywords()
            )
            mx.async_eval(y)
            pending.append((i, y))
    for i, y in pending:
        np.testing.assert_array_equal(oracle.bits_of(oracle.to_numpy(y)), want[i])


def test_stream_argument_of_every_op(judged_fmt):
    """`stream` takes a stream or a device, and the result does not depend on it."""
    w = mx.random.normal((5, 256))
    keywords = strategies.format_keywords(judged_fmt)
    plain = ops.quantize(w, **keywords)
    for stream in (mx.new_stream(mx.default_device()), mx.default_device()):
        q = ops.quantize(w, stream=stream, **keywords)
        assert all(
            mx.array_equal(a, b).item() for a, b in zip(q, plain, strict=True) if a is not None
        )
        assert mx.array_equal(
            ops.dequantize(*q, stream=stream, **keywords), ops.dequantize(*q, **keywords)
        ).item()
        assert mx.array_equal(ops.linear(w, w, stream=stream), ops.linear(w, w)).item()
        y = ops.gather_qmm(
            w[:, None],
            *(None if a is None else a[None] for a in q),
            rhs_indices=mx.zeros(5, mx.uint32),
            stream=stream,
            **keywords,
        )
        assert mx.array_equal(
            y[:, 0],
            ops.gather_qmm(
                w[:, None],
                *(None if a is None else a[None] for a in q),
                rhs_indices=mx.zeros(5, mx.uint32),
                **keywords,
            )[:, 0],
        ).item()


@pytest.mark.parametrize("threads", [2, 5])
def test_python_threads(threads):
    """Every thread with a stream of its own, all at once, repeatedly, each with another format."""
    judged = [f for f in formats.FORMATS if f.judged][:threads]
    cases = {f.name: problems(f) for f in judged}
    want = {name: [product(p) for p in group] for name, group in cases.items()}

    def work(name: str) -> None:
        stream = mx.new_stream(mx.default_device())
        for _ in range(6):
            for p, expected in zip(cases[name], want[name], strict=True):
                np.testing.assert_array_equal(product(p, stream), expected)

    with ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work, f.name) for f in judged]:
            future.result(timeout=300)


def test_many_small_calls_in_one_graph(judged_fmt, rng):
    """A chain and a fan of products, evaluated at once."""
    w = strategies.exact_weight(rng, judged_fmt, 128, 128, mx.float32)
    arrays, keywords = strategies.weight_arrays(w), strategies.format_keywords(judged_fmt)
    values = oracle.decode(judged_fmt, w)
    x = strategies.exact_activations(rng, (20, 2, 128), mx.float32)
    fan = [ops.quantized_matmul(mx.array(row), *arrays, **keywords) for row in x]
    mx.eval(fan)
    for row, y in zip(x, fan, strict=True):
        oracle.assert_equal(y, row.astype(np.float64) @ values.T)
    y, want = mx.array(x[0]), x[0].astype(np.float64)
    for _ in range(12):
        y = ops.quantized_matmul(y, *arrays, **keywords)
        y = y / mx.maximum(y.abs().max(), 1e-9)
        want = want @ values.T
        want /= max(np.abs(want).max(), 1e-9)
    assert np.abs(oracle.f64(y) - want).max() < 1e-4


THREADS = """
import hashlib
import mlx.core as mx
mx.set_default_device(mx.cpu)
from mlx_lowbit import _ext, ops
w, x = (mx.random.normal(shape, key=mx.random.key(1)) for shape in ((515, 1024), (40, 1024)))
q = ops.quantize(w, mode="nvfp4")
products = [ops.quantized_matmul(x[:m], *q, mode="nvfp4") for m in (1, 8, 40)]
parts = [q[0], q[1], *products, ops.linear(x, w)]
print(_ext.threads(), hashlib.sha1(b"".join(bytes(p.view(mx.uint8)) for p in parts)).hexdigest())
"""


def test_number_of_threads():
    """MLX_LOWBIT_NUM_THREADS is obeyed, and no result depends on it; nonsense means the default."""
    found = {}
    for count in ("1", "2", "3", "7", "64", "0", "-1", "many", ""):
        done = subprocess.run(
            [sys.executable, "-c", THREADS],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "MLX_LOWBIT_NUM_THREADS": count},
        )
        assert done.returncode == 0, (count, done.stderr)
        found[count] = done.stdout.split()
    assert len({digest for _, digest in found.values()}) == 1, found
    assert [found[c][0] for c in ("1", "2", "3", "7")] == ["1", "2", "3", "7"], found
    assert {found[c][0] for c in ("0", "-1", "many")} == {found[""][0]}, found


FORK = """
import os, sys
import mlx.core as mx
from mlx_lowbit import ops
key = mx.random.key(1)
w, x = (mx.random.normal(shape, key=key, stream=mx.cpu) for shape in ((512, 1024), (40, 1024)))
mx.eval(w, x)
def run():
    # MLX's threads, one a stream, do not follow a fork: only a stream made afterwards works.
    with mx.stream(mx.new_stream(mx.cpu)):
        q = ops.quantize(w, mode="mxfp8")
        return [ops.quantized_matmul(x[:m], *q, mode="mxfp8").tolist() for m in (1, 8, 40)]
before = run()
pids = []
for _ in range(2):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if run() == before else 3)
    pids.append(pid)
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
assert run() == before, "the parent's results changed"
print(codes)
sys.exit(codes != [0, 0])
"""


def test_after_fork():
    """A child made after the pool's threads started computes the same; so does its parent."""
    if mx.default_device() == mx.gpu:
        pytest.skip("of the CPU's threads; a CUDA context does not survive a fork")
    done = subprocess.run(
        [sys.executable, "-c", FORK],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
