"""One row: checks every library against float64, then times, interleaved, those that are right."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_lowbit import ops

from benchmarks.baselines import OURS, Peer
from benchmarks.cases import Case
from benchmarks.device import last_level_cache
from benchmarks.operands import Inputs, Reference, Weights, make_inputs, moved_bytes
from benchmarks.timing import (
    FOREIGN_LIMIT,
    Bandwidth,
    Candidate,
    ForeignLoad,
    Run,
    Timing,
    time_interleaved,
)

COLD_CACHES = 4  # cold: the rotated copies fill the last level cache this many times over ...
COLD_BYTES = 2**30  # ... up to this many bytes


@dataclass(frozen=True)
class Settings:
    """How every case is measured."""

    seconds: float
    rounds: int
    retries: int  # further attempts at a case during which other processes took too much
    cold: bool
    seed: int


@dataclass
class Row:
    """One line of the table.

    Times are in seconds, ``bandwidth`` in bytes a second. ``nbytes`` are packed weights, scales and
    biases; for quantize and dequantize the dense side too.
    """

    case: Case
    nbytes: int
    bandwidth: float
    bound: float
    plan: str = ""
    foreign: float | None = None
    timings: dict[str, Timing] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> Timing | None:
        """Our timing; None where our result was wrong."""
        return self.timings.get(OURS)

    @property
    def dirty(self) -> bool:
        """Whether other processes took so much of the cores that the times are upper bounds."""
        return self.foreign is not None and self.foreign > FOREIGN_LIMIT

    @property
    def bytes_per_second(self) -> float | None:
        """``nbytes`` over our median."""
        return self.nbytes / self.ours.median if self.ours else None

    @property
    def flops_per_second(self) -> float | None:
        """Of our median; None for ops that do not multiply."""
        return self.case.flops / self.ours.median if self.ours and self.case.flops else None

    def ratio(self, peer: str) -> float | None:
        """The peer's median over ours: above 1 ours is faster."""
        if self.ours is None or peer not in self.timings:
            return None
        return self.timings[peer].median / self.ours.median

    def to_json(self) -> dict[str, Any]:
        """Everything known of the row, in plain types and SI units."""
        case = {k: v for k, v in asdict(self.case).items() if k != "shape"}
        shape = self.case.shape
        return {
            **case,
            "shape": shape.name,
            "k": shape.k,
            "n": shape.n,
            "experts": shape.experts,
            "top_k": shape.top_k,
            "nbytes": self.nbytes,
            "read_bandwidth": self.bandwidth,
            "bytes_per_second": self.bytes_per_second,
            "flops_per_second": self.flops_per_second,
            "plan": self.plan,
            "foreign_load": self.foreign,
            "dirty": self.dirty,
            "error_bound": self.bound,
            "errors": {n: e if math.isfinite(e) else None for n, e in self.errors.items()},
            "timings": {name: asdict(t) for name, t in self.timings.items()},
            "ratios": {n: self.ratio(n) for n in self.timings if n != OURS and self.ours},
            "skipped": self.skipped,
        }


class Measurer:
    """Measures cases one after the other.

    It remembers what each library costs a token: no call is started that is known to be too slow.
    """

    def __init__(self, peers: Mapping[str, Peer], bandwidth: Bandwidth, settings: Settings) -> None:
        self._peers = peers
        self._bandwidth = bandwidth
        self._settings = settings
        self._per_token: dict[tuple[str, str, str, str, str], float] = {}

    def row(self, case: Case, weights: Weights, limit: float) -> Row:
        """Checks and times one case.

        Args:
            case: what to run.
            weights: of the case's shape, dtype and format.
            limit: seconds that a single call of a peer may take; ours is always run.
        """
        settings = self._settings
        inputs = make_inputs(case, settings.seed + 1)
        nbytes = moved_bytes(case, weights, inputs)
        reference = Reference(case, weights, inputs, settings.seed)
        row = Row(case, nbytes, 0.0, reference.bound, plan=_plan(case, weights, inputs))
        candidates = {}
        for peer in self._peers.values():
            try:
                candidate = self._prepare(row, peer, weights, inputs, reference, limit)
            except Exception as error:  # one library's failure must not end the others' rows
                row.skipped[peer.name] = f"{type(error).__name__}: {error}"[:200]
                continue
            if candidate is not None:
                candidates[peer.name] = candidate
        if OURS in candidates:
            row.bandwidth = self._bandwidth.of(cold_bytes() if settings.cold else nbytes)
            self._time(row, candidates)
        return row

    def _time(self, row: Row, candidates: Mapping[str, Candidate]) -> None:
        for _ in range(1 + self._settings.retries):
            load = ForeignLoad()
            timings = time_interleaved(candidates, self._settings.seconds, self._settings.rounds)
            foreign = load.share()
            if not row.timings or (foreign or 0.0) < (row.foreign or 0.0):
                row.timings, row.foreign = timings, foreign
            if not row.dirty:
                return

    def _prepare(
        self,
        row: Row,
        peer: Peer,
        weights: Weights,
        inputs: Inputs,
        reference: Reference,
        limit: float,
    ) -> Candidate | None:
        """Binds, predicts and checks one peer; None if it cannot run, is too slow or is wrong."""
        case = row.case
        if self._settings.cold and not peer.rotates:
            return None
        run = peer.bind(case, weights, inputs)
        if run is None:
            return None
        predicted = self._predict(peer, case, weights) if peer.name != OURS else 0.0
        if predicted > limit:
            row.skipped[peer.name] = f"up to {predicted:.1f} s a call"
            return None
        result, seconds = _timed(run)
        self._per_token[self._key(peer, case)] = seconds / max(1, case.m)
        error = row.errors[peer.name] = reference.error(result)
        bound = reference.bound if peer.name == OURS else peer.max_error
        if error > bound:
            row.skipped[peer.name] = f"wrong: error {error:.2g} above {bound:.2g}"
            return None
        runs = self._rotation(run, peer, case, weights, inputs)
        return Candidate(runs, seconds, peer.settle)

    def _predict(self, peer: Peer, case: Case, weights: Weights) -> float:
        """Upper bound for one call, in seconds: M times the cost a token at a smaller M."""
        if case.m <= 1:
            return 0.0
        key = self._key(peer, case)
        if key not in self._per_token:
            first = Case(case.op, case.format, case.dtype, 1, case.shape)
            run = peer.bind(first, weights, make_inputs(first, self._settings.seed + 1))
            if run is None:
                return 0.0
            self._per_token[key] = _timed(run)[1]
        return self._per_token[key] * case.m

    def _key(self, peer: Peer, case: Case) -> tuple[str, str, str, str, str]:
        op = "product" if case.op in ("matvec", "matmul") else case.op
        return peer.name, op, case.format, case.dtype, case.shape.name

    def _rotation(
        self, run: Run, peer: Peer, case: Case, weights: Weights, inputs: Inputs
    ) -> Sequence[Run]:
        if not self._settings.cold:
            return [run]
        dense = peer.dense or case.op == "quantize"
        size = weights.source.nbytes if dense else weights.nbytes
        copies = weights.copies(max(1, cold_bytes() // size), sources=case.op == "quantize")
        others = (peer.bind(case, copy, inputs) for copy in copies)
        return [run, *(other for other in others if other is not None)]


def cold_bytes() -> int:
    """Bytes that the copies of cold weights fill together."""
    return min(COLD_BYTES, COLD_CACHES * last_level_cache())


def _timed(run: Run) -> tuple[Any, float]:
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def _plan(case: Case, weights: Weights, inputs: Inputs) -> str:
    """What ``explain`` says of the case, for the op that it knows."""
    if case.op not in ("matvec", "matmul"):
        return ""
    return ops.explain(inputs.x, *weights.packed, **weights.keywords)
