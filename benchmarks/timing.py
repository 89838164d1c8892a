"""The clock: interleaved blocks, foreign load, and the read bandwidth of the machine.

``time_calls`` is the only place that touches a clock for a kernel: a backend whose calls return
before the work is done replaces that function alone.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.device import busy_seconds

Run = Callable[[], Any]  # does the whole work once and returns its result, done

# The share of all cores that other processes may take before a case counts as dirty.
FOREIGN_LIMIT = 0.08


@dataclass(frozen=True)
class Candidate:
    """One library's calls for one case.

    A single call, repeated, finds its weights hot; several in rotation, each with weights of its
    own, find them cold.
    """

    runs: Sequence[Run]
    expected: float  # seconds of a call made before, to see whether warming up is worth it
    settle: float = 0.0  # seconds its workers go on spinning, and would take a core from the next


@dataclass(frozen=True)
class Timing:
    """What one library needed for one case, in seconds."""

    median: float  # of the block medians
    spread: float  # (largest - smallest block median) / median
    best: float  # the fastest single call
    blocks: int
    calls: int


def time_calls(runs: Sequence[Run], first: int, seconds: float) -> list[float]:
    """Times ``runs[first]``, ``runs[first + 1]``, ... for about ``seconds``, at least one call."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while True:
        run = runs[(first + len(times)) % len(runs)]
        start = time.perf_counter()
        run()
        stop = time.perf_counter()
        times.append(stop - start)
        if stop >= end:
            return times


def time_interleaved(
    candidates: Mapping[str, Candidate], seconds: float, rounds: int
) -> dict[str, Timing]:
    """Times all candidates in turn, block by block, so that a drift of the machine meets each.

    Args:
        candidates: name -> what to time.
        seconds: for all blocks of all candidates together. A candidate of which one call takes
            longer than a block is not warmed up and gets fewer blocks, at least one of one call.
        rounds: blocks of each candidate.
    """
    share = seconds / len(candidates)
    medians: dict[str, list[float]] = {name: [] for name in candidates}
    calls: dict[str, list[float]] = {name: [] for name in candidates}
    for round_ in range(rounds):
        for name, candidate in candidates.items():
            if round_ and sum(calls[name]) > 2 * share:
                continue
            if candidate.expected < share / rounds:
                for run in candidate.runs[:2]:
                    run()
            times = time_calls(candidate.runs, len(calls[name]), share / rounds)
            calls[name] += times
            medians[name].append(statistics.median(times))
            time.sleep(candidate.settle)
    return {name: _timing(medians[name], calls[name]) for name in candidates}


def _timing(medians: Sequence[float], calls: Sequence[float]) -> Timing:
    median = statistics.median(medians)
    spread = (max(medians) - min(medians)) / median
    return Timing(median, spread, min(calls), len(medians), len(calls))


class ForeignLoad:
    """Measures the share of all cores that other processes took, in steps of 10 ms.

    Use it over 0.2 s or more. ``share()`` is None where /proc/stat does not exist.
    """

    def __init__(self) -> None:
        self._cores = os.cpu_count() or 1
        self._wall = time.perf_counter()
        self._busy = busy_seconds()
        self._own = _own_seconds()

    def share(self) -> float | None:
        """Foreign busy time since the start of the measurement, over wall time times cores."""
        busy = busy_seconds()
        if busy is None or self._busy is None:
            return None
        wall = time.perf_counter() - self._wall
        foreign = busy - self._busy - (_own_seconds() - self._own)
        return max(0.0, foreign / (wall * self._cores))


def _own_seconds() -> float:
    own = os.times()
    return own.user + own.system


class Bandwidth:
    """Read bandwidth of ``threads`` threads over a set of a given size, in bytes a second.

    Each thread holds a contiguous slice and takes ``numpy.dot`` of its two halves (OpenBLAS, one
    thread each: two forward streams, one fused multiply-add for two floats), again and again. The
    best pass counts, since a floor has to lie below everything that is timed. Each size is measured
    once.
    """

    METHOD = "numpy.dot over the two halves of a slice in each thread, best of 9 passes"

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._measured: dict[int, float] = {}

    def of(self, nbytes: int) -> float:
        """Bytes a second for a set of ``nbytes``, rounded up to whole MiB, 1 GiB at most."""
        mib = max(1, min(1024, -(-nbytes // 2**20)))
        if mib not in self._measured:
            self._measured[mib] = self._measure(mib * 2**20)
        return self._measured[mib]

    def measured(self) -> dict[int, float]:
        """Every set measured so far: MiB -> bytes a second."""
        return dict(sorted(self._measured.items()))

    def _measure(self, size: int) -> float:
        slices = np.array_split(np.ones(size // 4, np.float32), self.threads)
        repeats = max(
            1, 2**26 // size
        )  # 64 MiB a pass: waking the threads (some 50 us) stays under 5 %

        def read(part: np.ndarray) -> None:
            half = len(part) // 2
            for _ in range(repeats):
                np.dot(part[:half], part[half : 2 * half])

        best = 0.0
        with ThreadPoolExecutor(self.threads) as pool:
            for _ in range(9):
                start = time.perf_counter()
                list(pool.map(read, slices))
                best = max(best, size * repeats / (time.perf_counter() - start))
        return best
