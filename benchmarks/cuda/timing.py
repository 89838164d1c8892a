"""How calls on an NVIDIA GPU are timed: replays of one CUDA graph over several copies of weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch

from benchmarks.spread import median_and_spread

DEVICE = "cuda"
Rows = dict[int, tuple[float, float]]
"""By M: (median in microseconds, half the spread over the median)."""


def capture(
    calls: list[Callable[[], object]], stream: torch.cuda.Stream
) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of some forty calls on ``stream``, which is torch's current one, and how many."""
    repeats = max(1, 40 // len(calls))
    for call in calls:
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for call in calls:
                call()
    return graph, repeats * len(calls)


def replay(calls: list[Callable[[], object]]) -> tuple[float, float]:
    """(median, half the spread over the median) of one call, in microseconds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph, count = capture(calls, stream)
        # A clock that came down while results were checked is not that of a device at work.
        begin = time.perf_counter()
        while time.perf_counter() - begin < 0.05:
            graph.replay()
            stream.synchronize()
        times = []
        for _ in range(9):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(stream)
            graph.replay()
            end.record(stream)
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3 / count)
    return median_and_spread(times)


def copies(nbytes: int) -> int:
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, math.ceil(4 * cache / nbytes))
