"""Mixtures of experts on an NVIDIA GPU, one projection: rows of x times the experts they chose.

    python -m benchmarks.cuda.experts --library BUILD/kernels/cuda/liblowbit_cuda_library.so

Each token draws ``--top`` experts of equal probability. Up to 63 pairs go as they were drawn, from
64 on sorted by expert with a row of x each, as mlx-lm's switch layers do; ``--unsorted`` times the
others unsorted as well. Times are CUDA-graph replays over routings enough to read four times the L2
cache; the floor reads each expert that is hit once, at 4.46 TB/s, and takes 2.2 us. torch's bmm in
bfloat16 multiplies as many rows, spread evenly over all experts. A sample of the results is
compared with float64 products of decoded bits first.
"""

from __future__ import annotations

import ctypes
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from . import command
from .timing import DEVICE, copies, replay
from .weights import BOUND, Format, Weights, decode, formats, random_weights

BYTES_PER_US, START_US = 4.46e6, 2.2
SORTED_FROM = 64  # pairs
MOST_ROUTINGS, SAMPLE = 64, 48


@dataclass
class Routing:
    """Pairs [tokens * top] int64: rows of x [rows, K], and experts."""

    x: torch.Tensor
    lhs: torch.Tensor
    rhs: torch.Tensor
    y: torch.Tensor

    @property
    def hit(self) -> int:
        return int(self.rhs.unique().numel())


def route(tokens: int, experts: int, top: int, K: int, N: int, in_order: bool) -> Routing:
    drawn = torch.rand(tokens, experts, device=DEVICE).topk(top).indices.flatten()
    rows = torch.arange(tokens * top, device=DEVICE)
    x = torch.randn(tokens, K, device=DEVICE).bfloat16()
    y = torch.full((tokens * top, N), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    if not in_order:
        return Routing(x, rows // top, drawn, y)
    rhs, order = drawn.sort()
    return Routing(x[order // top].contiguous(), rows, rhs, y)


class Library:
    def __init__(self, path: Path):
        self.product = ctypes.CDLL(str(path.resolve())).lowbit_gather_product
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.product.argtypes = [
            ctypes.c_int, ctypes.c_int, *[size] * 5, *[pointer] * 7, ctypes.c_bool, pointer,
        ]  # fmt: skip

    def __call__(self, f: Format, w: Weights, r: Routing, quantize_x: bool) -> None:
        """r.y <- rows of r.x times experts w [E, N, K], on torch's current stream."""
        E, N, _ = w.codes.shape
        at = [*w.pointers(), *(t.data_ptr() for t in (r.x, r.lhs, r.rhs, r.y))]
        stream = torch.cuda.current_stream().cuda_stream
        status = self.product(
            f.id, 2, len(r.rhs), len(r.x), E, N, r.x.shape[1], *at, quantize_x, stream
        )
        if status:
            raise RuntimeError(f"{f.name}, {len(r.rhs)} pairs: CUDA error {status}")


def error(f: Format, w: Weights, r: Routing) -> float:
    """Of a sample of pairs, over its bound."""
    K = r.x.shape[1]
    worst = 0.0
    for i in torch.randperm(len(r.rhs))[:SAMPLE].tolist():
        expected = decode(f, w[int(r.rhs[i])], K) @ r.x[r.lhs[i]].double()
        worst = max(worst, float((r.y[i].double() - expected).norm() / expected.norm() / BOUND))
    return worst


def time_bmm(pairs: int, E: int, K: int, N: int) -> float:
    x = torch.randn(E, -(-pairs // E), K, device=DEVICE).bfloat16()
    w = torch.randn(E, K, N, device=DEVICE).bfloat16()
    return replay([lambda: torch.bmm(x, w)])[0]


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x1408x128"], help="KxNxexperts")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 512, 4096])
    parser.add_argument("--top", type=int, default=8)
    parser.add_argument("--unsorted", action="store_true")
    parser.add_argument("--quantize-x", action="store_true", help="mxfp8 and nvfp4 only")
    options = parser.parse_args()
    known = formats()
    if unknown := [name for name in options.formats if name not in known]:
        parser.error(f"--formats: {', '.join(unknown)}; expected some of {', '.join(known)}")
    run, rows = Library(options.library), []
    torch.manual_seed(0)
    for shape in options.shapes:
        K, N, E = (int(n) for n in shape.split("x"))
        bmm = {t: time_bmm(t * options.top, E, K, N) for t in options.tokens if t >= 512}
        for name in options.formats:
            f = known[name]
            w = random_weights(f, E, N, K=K)
            one = w.nbytes() // E
            for tokens in options.tokens:
                pairs = tokens * options.top
                orders = {pairs >= SORTED_FROM, *([False] if options.unsorted else [])}
                for in_order in sorted(orders, reverse=True):
                    count = min(MOST_ROUTINGS, copies(one * min(E, pairs)))
                    routings = [route(tokens, E, options.top, K, N, in_order) for _ in range(count)]
                    call = partial(run, f, w, quantize_x=options.quantize_x)
                    call(routings[0])
                    if not options.quantize_x and not (e := error(f, w, routings[0])) < 1:
                        raise SystemExit(f"{name}, {tokens} tokens: error {e:.3g} of its bound")
                    median, spread = replay([partial(call, r) for r in routings])
                    hit = statistics.mean(r.hit for r in routings)
                    floor = START_US + one * hit / BYTES_PER_US
                    row = {
                        "who": name, "K": K, "N": N, "experts": E, "top": options.top,
                        "tokens": tokens, "sorted": in_order, "us": median, "spread": spread,
                        "hit": hit, "floor_us": floor, "bmm_us": bmm.get(tokens),
                    }  # fmt: skip
                    rows.append(row)
                    print(
                        f"{name:12} K {K} N {N} experts {E} tokens {tokens:5} "
                        f"{'sorted  ' if in_order else 'unsorted'} {median:8.1f} us ± {spread:3.0%}"
                        f"  {one * hit / median / 1e6:5.2f} TB/s, {median / floor:4.1f} times the "
                        "floor"
                        + (f", {bmm[tokens] / median:4.2f} times bmm" if tokens in bmm else ""),
                        flush=True,
                    )
    command.write(options.json, rows, __doc__)


if __name__ == "__main__":
    main()
