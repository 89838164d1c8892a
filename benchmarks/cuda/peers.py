"""Others' low-bit products, timed beside ours: torch's int4pack, humming-kernels and MLX's own.

A peer that is not installed is left out, with a line that says so. MLX compiles some ten seconds
for each format and kind of M.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice, pairwise
from types import ModuleType
from typing import TypeVar

import torch

from benchmarks.spread import median_and_spread

from .timing import DEVICE, Rows, copies, replay
from .weights import formats

T = TypeVar("T")
Case = tuple[int, bool]
"""Of experts: tokens, and whether the pairs are sorted by expert."""
CaseTimes = dict[Case, tuple[float, float]]
"""(median in microseconds, half the spread over the median)."""
Timed = Iterator[tuple[str, T]]
"""Who, and its times, as they are measured."""
Chosen = dict[Case, list[list[int]]]
"""Lists of the experts of tokens * top pairs, several for each case."""

EVALUATIONS, MOST_CALLS, MOST_US = 5, 40, 2e5

# What humming calls the formats; its affine zero points are floats, as MLX's biases are.
_AFFINE = {"has_zero_point": True, "is_fp_zero_point": True, "group_size": 64}
HUMMING: dict[str, dict[str, object]] = {
    "affine3_g64": {"dtype": "uint3", **_AFFINE},
    "affine4_g64": {"dtype": "uint4", **_AFFINE},
    "affine8_g64": {"dtype": "uint8", **_AFFINE},
    "mxfp8": {"dtype": "float8e4m3", "scale_dtype": "float8e8m0", "group_size": 32},
    "nvfp4": {
        "dtype": "float4e2m1",
        "scale_dtype": "float8e4m3",
        "group_size": 16,
        "scale_2_type": "tensor",
    },
}


def int4pack(K: int, N: int, ms: list[int], names: list[str], quantize_x: bool) -> Timed[Rows]:
    """torch's `_weight_int4pack_mm`, 4 bits in groups of 64, for up to 64 rows of bfloat16 x."""
    if quantize_x or "affine4_g64" not in names:
        return
    one = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8, device=DEVICE)
    scales = torch.rand(K // 64, N, 2, device=DEVICE).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack(one, 8)
    every = [packed.clone() for _ in range(copies(N * K // 2))]
    rows = {}
    for M in (m for m in ms if m <= 64):
        x = torch.randn(M, K, device=DEVICE).bfloat16()
        rows[M] = replay(
            [lambda w=w, x=x: torch.ops.aten._weight_int4pack_mm(x, w, 64, scales) for w in every]
        )
    yield "torch int4pack", rows


def humming(K: int, N: int, ms: list[int], names: list[str], quantize_x: bool) -> Timed[Rows]:
    """humming-kernels with bfloat16 x, each M with the configuration that it recommends."""
    if quantize_x:
        return
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    dense = torch.randn(N, K, device=DEVICE).bfloat16() * 0.02
    for name in filter(HUMMING.__contains__, names):
        layer = HummingLayer(
            shape_n=N, shape_k=K, weight_config=dict(HUMMING[name]), torch_dtype=torch.bfloat16
        ).to(DEVICE)
        layer.load_from_unquantized(dense)
        layer.transform()
        nbytes = sum(p.numel() * p.element_size() for p in layer.parameters())
        every = [layer, *(copy.deepcopy(layer) for _ in range(copies(nbytes) - 1))]
        bounds = pairwise([0, *sorted(ms)[:-1], 1 << 30])
        tuning = json.dumps(
            [
                [*bound, dict(get_heuristics_config(layer.humming_config, shape_m=M))]
                for M, bound in zip(sorted(ms), bounds, strict=True)
            ]
        )
        calls = [partial(one, tuning_config=tuning) for one in every]
        rows = {}
        for M in ms:
            x = torch.randn(M, K, device=DEVICE).bfloat16()
            rows[M] = replay([partial(call, x) for call in calls])
        yield f"humming {name}", rows


def mlx_core() -> ModuleType:
    """MLX, imported only here: what does not time it runs without it."""
    import mlx.core as mx

    if not mx.cuda.is_available():
        raise ImportError("mlx without CUDA")
    return mx


def timed(calls: list[Callable[[], object]]) -> tuple[float, float]:
    """(median, half the spread over the median) of one call of MLX, in microseconds.

    On the wall clock, ``calls`` in turn: 5 evaluations of 1 to 40, of at most about 0.2 s."""
    mx, turns = mlx_core(), cycle(calls)

    def evaluate(count: int) -> float:
        begin = time.perf_counter()
        mx.eval([call() for call in islice(turns, count)])
        mx.synchronize()
        return (time.perf_counter() - begin) * 1e6 / count

    evaluate(1)  # compiles
    count = min(MOST_CALLS, max(1, int(MOST_US / evaluate(1))))
    evaluate(count)  # allocates
    return median_and_spread([evaluate(count) for _ in range(EVALUATIONS)])


def mlx_name(name: str, quantize_x: bool) -> str:
    """What rows of MLX's product in a format are called."""
    return f"mlx qqmm {name}" if quantize_x else f"mlx {name}"


def mlx_formats(names: list[str], quantize_x: bool) -> Iterator[tuple[str, dict[str, object]]]:
    """What rows are called and MLX's keywords, of the formats that have the product."""
    for f in map(formats().__getitem__, names):
        if not quantize_x or f.mode in ("mxfp8", "nvfp4"):
            shape = {"mode": f.mode, "bits": f.bits, "group_size": f.group}
            yield mlx_name(f.name, quantize_x), shape


def mlx(K: int, N: int, ms: list[int], names: list[str], quantize_x: bool) -> Timed[Rows]:
    """MLX's dense product and its `quantized_matmul` or, with ``quantize_x``, its `qqmm`."""
    mx = mlx_core()
    xs = {M: mx.random.normal((M, K)).astype(mx.bfloat16) for M in ms}
    dense = [
        (0.02 * mx.random.normal((N, K))).astype(mx.bfloat16) for _ in range(copies(2 * N * K))
    ]
    mx.eval(xs, dense)
    product = mx.qqmm if quantize_x else mx.quantized_matmul  # of w^T, both
    yield "mlx bf16", {M: timed([lambda x=x, w=w: x @ w.T for w in dense]) for M, x in xs.items()}
    for who, shape in mlx_formats(names, quantize_x):
        one = mx.quantize(dense[0], **shape)
        count = copies(sum(part.nbytes for part in one))
        every = [[mx.array(part) + mx.zeros_like(part) for part in one] for _ in range(count)]
        mx.eval(every)
        times = {M: timed([partial(product, x, *w, **shape) for w in every]) for M, x in xs.items()}
        yield who, times


def mlx_experts(
    K: int, N: int, E: int, chosen: Chosen, names: list[str], quantize_x: bool
) -> Timed[CaseTimes]:
    """MLX's `gather_mm` and its `gather_qmm` or, with ``quantize_x``, its `gather_qqmm`.

    Called as by mlx-lm's switch layers, with weights [E, N, K]."""
    mx = mlx_core()

    def operands(tokens: int, in_order: bool, experts: list[int]) -> tuple[object, object]:
        """x [pairs, 1, K] and experts [pairs], or x [tokens, 1, 1, K] and experts [tokens, top]."""
        rhs = mx.array(experts, mx.uint32)
        rows = (len(experts), 1, K) if in_order else (tokens, 1, 1, K)
        x = mx.random.normal(rows).astype(mx.bfloat16)
        return x, rhs if in_order else rhs.reshape(tokens, -1)

    pairs = {case: [operands(*case, experts) for experts in chosen[case]] for case in chosen}
    dense = mx.stack([(0.02 * mx.random.normal((N, K))).astype(mx.bfloat16) for _ in range(E)])
    mx.eval(list(pairs.values()), dense)

    def measured(product: Callable[..., object]) -> CaseTimes:
        return {
            case: timed(
                [partial(product, x, rhs_indices=r, sorted_indices=case[1]) for x, r in pairs[case]]
            )
            for case in pairs
        }

    gather = mx.gather_qqmm if quantize_x else mx.gather_qmm  # of w^T, both
    yield "mlx bf16", measured(lambda x, **how: mx.gather_mm(x, dense.mT, **how))
    for who, shape in mlx_formats(names, quantize_x):
        w = mx.quantize(dense, **shape)
        mx.eval(w)
        yield who, measured(lambda x, w=w, s=shape, **how: gather(x, *w, **s, **how))


PEERS = {"int4pack": int4pack, "humming": humming, "mlx": mlx}
EXPERT_PEERS = {"mlx": mlx_experts}


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for package in ("torch", "humming-kernels", "mlx"):
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found


def measure(who: str, peer: Callable[..., Timed[T]], *arguments: object) -> Timed[T]:
    """What ``peer`` measures; nothing, and a line why, where it is not installed."""
    try:
        yield from peer(*arguments)
    except ImportError as error:
        print(f"{who}: not timed ({error})", flush=True)
