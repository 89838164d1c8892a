"""Others' low-bit products, timed beside ours: torch's int4pack, humming-kernels and MLX's own.

A peer that is not installed is left out, with a line that says so.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import pairwise

import torch

from benchmarks.spread import median_and_spread

from .timing import DEVICE, Rows, copies, replay

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


def int4pack(K: int, N: int, ms: list[int], names: list[str]) -> dict[str, Rows]:
    """torch's `_weight_int4pack_mm`, 4 bits in groups of 64, for up to 64 rows of x."""
    if "affine4_g64" not in names:
        return {}
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
    return {"torch int4pack": rows}


def humming(K: int, N: int, ms: list[int], names: list[str]) -> dict[str, Rows]:
    """humming-kernels with bfloat16 x, each M with the configuration that it recommends."""
    from humming.layer import HummingLayer
    from humming.tune import get_heuristics_config

    result = {}
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
        result[f"humming {name}"] = rows
    return result


def mlx(K: int, N: int, ms: list[int], names: list[str]) -> dict[str, Rows]:
    """MLX's `quantized_matmul` and dense product: 40 calls an evaluation, on the wall clock.

    MLX compiles some ten seconds for each format and kind of M."""
    import mlx.core as mx
    import mlx_lowbit

    if not mx.cuda.is_available():
        raise ImportError("mlx without CUDA")

    def timed(calls: list[Callable[[mx.array], mx.array]]) -> Rows:
        rows = {}
        for M in ms:
            x = mx.random.normal((M, K)).astype(mx.bfloat16)
            mx.eval(x)
            many = calls * max(1, 40 // len(calls))
            times = []
            for _ in range(8):
                begin = time.perf_counter()
                mx.eval([call(x) for call in many])
                mx.synchronize()
                times.append((time.perf_counter() - begin) * 1e6 / len(many))
            rows[M] = median_and_spread(times[1:])  # the first compiles
        return rows

    dense = [
        (0.02 * mx.random.normal((N, K))).astype(mx.bfloat16) for _ in range(copies(2 * N * K))
    ]
    mx.eval(dense)
    result = {"mlx bf16": timed([lambda x, w=w: x @ w.T for w in dense])}
    for name in names:
        f = next(f for f in mlx_lowbit.formats.FORMATS if f.name == name)
        shape = {"mode": f.mode, "bits": f.bits, "group_size": f.group_size}
        one = mx.quantize(dense[0], **shape)
        count = copies(sum(part.nbytes for part in one))
        every = [[mx.array(part) + mx.zeros_like(part) for part in one] for _ in range(count)]
        mx.eval(every)
        result[f"mlx {name}"] = timed(
            [lambda x, w=w, s=shape: mx.quantized_matmul(x, *w, transpose=True, **s) for w in every]
        )
    return result


PEERS = {"int4pack": int4pack, "humming": humming, "mlx": mlx}


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for package in ("torch", "humming-kernels", "mlx"):
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found


def measure(who: str, K: int, N: int, ms: list[int], names: list[str]) -> dict[str, Rows]:
    """Rows of one peer by name; none, and a line why, where it is not installed."""
    try:
        return PEERS[who](K, N, ms, names)
    except ImportError as error:
        print(f"{who}: not timed ({error})", flush=True)
        return {}
