"""Mixtures of experts on an NVIDIA GPU, one projection: rows of x times the experts they chose.

    python -m benchmarks.cuda.experts --library BUILD/kernels/cuda/liblowbit_cuda_library.so

Each token draws ``--top`` experts of equal probability. Up to 63 pairs go as they were drawn, from
64 on sorted by expert with a row of x each, as mlx-lm's switch layers do; ``--unsorted`` times the
others unsorted as well. Times are CUDA-graph replays over routings enough to read four times the L2
cache; the floor reads each expert that is hit once, at 4.46 TB/s, and takes 2.2 us. torch's bmm in
bfloat16 multiplies as many rows, spread evenly over all experts. A sample of the results is
compared with float64 products of decoded bits first. ``--peers mlx`` times MLX's gather_qmm (with
``--quantize-x`` gather_qqmm) and, in bfloat16, gather_mm first, as mlx-lm's switch layers call
them: on the wall clock, eight routings in turn, five evaluations of 1 to 40 calls.
"""

from __future__ import annotations

import ctypes
import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from . import command, peers
from .timing import DEVICE, copies, replay
from .weights import BOUND, Format, Weights, decode, formats, random_weights

BYTES_PER_US, START_US = 4.46e6, 2.2
SORTED_FROM = 64  # pairs
MOST_ROUTINGS, PEER_ROUTINGS, SAMPLE = 64, 8, 48


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
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=peers.EXPERT_PEERS,
        default=[],
        help="also time MLX's gather_qmm (--quantize-x: gather_qqmm) and bfloat16 gather_mm",
    )
    options = parser.parse_args()
    known = formats()
    if unknown := [name for name in options.formats if name not in known]:
        parser.error(f"--formats: {', '.join(unknown)}; expected some of {', '.join(known)}")
    run, rows, top = Library(options.library), [], options.top
    cases = [
        (tokens, in_order)
        for tokens in options.tokens
        for in_order in (True, False)
        if in_order == (tokens * top >= SORTED_FROM) or (options.unsorted and not in_order)
    ]

    def add(
        who: str,
        shape: tuple[int, int, int],
        case: peers.Case,
        time: tuple[float, float],
        more: str = "",
        **columns: float | None,
    ) -> None:
        (K, N, E), (tokens, in_order), (median, spread) = shape, case, time
        row = {
            "who": who, "K": K, "N": N, "experts": E, "top": top, "tokens": tokens,
            "sorted": in_order, "us": median, "spread": spread,
        }  # fmt: skip
        rows.append(row | columns)
        print(
            f"{who:15} K {K} N {N} experts {E} tokens {tokens:5} "
            f"{'sorted  ' if in_order else 'unsorted'} {median:8.1f} us ± {spread:3.0%}{more}",
            flush=True,
        )

    torch.manual_seed(0)
    for shape in options.shapes:
        K, N, E = (int(n) for n in shape.split("x"))
        bmm = {t: time_bmm(t * top, E, K, N) for t in options.tokens if t >= 512}
        theirs: dict[str, peers.CaseTimes] = {}
        for peer in options.peers:
            chosen = {
                case: [
                    route(case[0], E, top, K, N, case[1]).rhs.tolist() for _ in range(PEER_ROUTINGS)
                ]
                for case in cases
            }
            arguments = (K, N, E, chosen, options.formats, options.quantize_x)
            for who, times in peers.measure(peer, peers.EXPERT_PEERS[peer], *arguments):
                theirs[who] = times
                for case, time in times.items():
                    add(who, (K, N, E), case, time)
        for name in options.formats:
            f = known[name]
            w = random_weights(f, E, N, K=K)
            one = w.nbytes() // E
            of_mlx = theirs.get(peers.mlx_name(name, options.quantize_x), {})
            for tokens, in_order in cases:
                count = min(MOST_ROUTINGS, copies(one * min(E, tokens * top)))
                routings = [route(tokens, E, top, K, N, in_order) for _ in range(count)]
                call = partial(run, f, w, quantize_x=options.quantize_x)
                call(routings[0])
                if not options.quantize_x and not (e := error(f, w, routings[0])) < 1:
                    raise SystemExit(f"{name}, {tokens} tokens: error {e:.3g} of its bound")
                median, spread = replay([partial(call, r) for r in routings])
                hit = statistics.mean(r.hit for r in routings)
                floor = START_US + one * hit / BYTES_PER_US
                bmm_us, mlx_us = bmm.get(tokens), of_mlx.get((tokens, in_order), (None,))[0]
                others = {"bmm": bmm_us, "MLX": mlx_us}
                add(
                    name,
                    (K, N, E),
                    (tokens, in_order),
                    (median, spread),
                    f"  {one * hit / median / 1e6:5.2f} TB/s, {median / floor:4.1f} times the floor"
                    + "".join(f", {us / median:4.2f} times {o}" for o, us in others.items() if us),
                    hit=hit,
                    floor_us=floor,
                    bmm_us=bmm_us,
                    mlx_us=mlx_us,
                )
    command.write(options.json, rows, __doc__)


if __name__ == "__main__":
    main()
