"""What products of many rows cost an NVIDIA GPU: time, clock, power, energy.

    python -m benchmarks.cuda.power --library BUILD/kernels/cuda/liblowbit_cuda_library.so

Each product runs for some seconds, ours and cuBLAS's (torch, bfloat16) of random matrices, four
times the L2 cache in all, with random and with zero activations. Clock and power are medians of
what nvidia-smi says every 100 ms; energy is that power times the time of a call. At its power
limit a GPU lowers its clock, and a product takes as long as its energy does: then fewer joules are
what makes it faster.
"""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial

import torch

from . import command
from .__main__ import Library
from .timing import DEVICE, capture, copies
from .weights import formats, random_weights

QUERY = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw.instant", "--format=csv,noheader,nounits"]


class Meter:
    """Collects (MHz, watts) while it is open."""

    def __enter__(self) -> Meter:
        query = [*QUERY, "-lms", "100", "-i", str(torch.cuda.current_device())]
        self.process = subprocess.Popen(query, stdout=subprocess.PIPE, text=True)
        self.samples: list[tuple[float, float]] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            clock, power = line.split(",")
            self.samples.append((float(clock), float(power)))

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.reader.join()


def measure(calls: list[Callable[[], object]], seconds: float) -> dict[str, float]:
    """Microseconds a call, and what the second half of the samples says."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph, in_graph = capture(calls, stream)
        with Meter() as meter:
            begin, count = time.perf_counter(), 0
            while (passed := time.perf_counter() - begin) < seconds:
                graph.replay()
                stream.synchronize()
                count += in_graph
    late = meter.samples[len(meter.samples) // 2 :]
    if not late:
        raise SystemExit("nvidia-smi said nothing: is it there, and --seconds at least 1?")
    us = passed / count * 1e6
    clock, power = (statistics.median(values) for values in zip(*late, strict=True))
    return {"us": us, "MHz": clock, "W": power, "mJ": us * power / 1e3}


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--shape", default="4096x14336", help="KxN")
    parser.add_argument("--m", nargs="+", type=int, default=[256, 2048])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each product")
    options = parser.parse_args()
    K, N = (int(n) for n in options.shape.split("x"))
    run, known, rows = Library(options.library), formats(), []
    products: dict[str, Callable[[torch.Tensor, torch.Tensor], list[Callable[[], object]]]] = {}
    dense = [torch.randn(N, K, device=DEVICE).bfloat16() for _ in range(copies(2 * N * K))]
    products["torch bf16"] = lambda x, y: [partial(torch.mm, x, w.T, out=y) for w in dense]
    for name in options.formats:
        f = known[name]
        weights = [random_weights(f, N, K=K)]
        weights += [random_weights(f, N, K=K) for _ in range(copies(weights[0].nbytes()) - 1)]
        products[name] = lambda x, y, f=f, weights=weights: [
            partial(run, f, x, w, y) for w in weights
        ]
    for M in options.m:
        y = torch.empty(M, N, device=DEVICE, dtype=torch.bfloat16)
        for kind in ("random", "zero"):
            x = torch.randn(M, K, device=DEVICE).bfloat16() * (kind == "random")
            for who, calls in products.items():
                row = {"who": who, "K": K, "N": N, "M": M, "x": kind}
                row |= measure(calls(x, y), options.seconds)
                rows.append(row)
                print(
                    f"{who:14} M {M:4}  {kind:6} x {row['us']:7.1f} us  {row['MHz']:5.0f} MHz  "
                    f"{row['W']:4.0f} W  {row['mJ']:6.1f} mJ",
                    flush=True,
                )
    command.write(options.json, rows, __doc__)


if __name__ == "__main__":
    main()
