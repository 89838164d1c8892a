"""Products on an NVIDIA GPU, kernels alone: ours, cuBLAS (torch, bfloat16) and peers.

    cmake --build BUILD --target lowbit_cuda_library
    python -m benchmarks.cuda --library BUILD/kernels/cuda/liblowbit_cuda_library.so

Times are CUDA-graph replays, microseconds a call, over as many copies of the weights as make four
times the L2 cache: the median of nine replays, and their spread. Results are compared with a
float64 product of decoded bits first; a wrong one is not timed. Needs torch with CUDA; `--peers`
adds torch's int4pack, humming-kernels and MLX's own products where they are installed, MLX's on the
wall clock, five evaluations of up to 40 calls. `--quantize-x` times qqmm, ours and of the peers
MLX's, with the quantization of x.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from . import command, peers
from .timing import DEVICE, Rows, copies, replay
from .weights import BOUND, Format, Weights, decode, formats, random_weights


class Library:
    def __init__(self, path: Path):
        self.product = ctypes.CDLL(str(path.resolve())).lowbit_product
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        self.product.argtypes = [
            ctypes.c_int, ctypes.c_int, size, size, size, *[pointer] * 5, ctypes.c_bool, pointer,
        ]  # fmt: skip

    def __call__(
        self, f: Format, x: torch.Tensor, w: Weights, y: torch.Tensor, quantize_x: bool = False
    ) -> None:
        """y[M, N] <- x[M, K] @ w^T on torch's current stream."""
        at = [*w.pointers(), x.data_ptr(), y.data_ptr()]
        stream = torch.cuda.current_stream().cuda_stream
        status = self.product(f.id, 2, x.shape[0], y.shape[1], x.shape[1], *at, quantize_x, stream)
        if status:
            raise RuntimeError(f"{f.name} {tuple(x.shape)}: CUDA error {status}")


def measure_torch(K: int, N: int, ms: list[int]) -> Rows:
    weights = [torch.randn(N, K, device=DEVICE).bfloat16() * 0.02 for _ in range(copies(2 * N * K))]
    rows = {}
    for M in ms:
        x = torch.randn(M, K, device=DEVICE).bfloat16()
        rows[M] = replay([lambda w=w, x=x: x @ w.T for w in weights])
    return rows


def measure_ours(
    run: Library, f: Format, K: int, N: int, ms: list[int], quantize_x: bool
) -> dict[int, tuple[float, float, float]]:
    """(median, spread, error over its bound) by M; no error for quantized activations."""
    weights = [random_weights(f, N, K=K)]
    weights += [random_weights(f, N, K=K) for _ in range(copies(weights[0].nbytes()) - 1)]
    rows = {}
    for M in ms:
        x = torch.randn(M, K, device=DEVICE).bfloat16()
        y = torch.full((M, N), float("nan"), device=DEVICE, dtype=torch.bfloat16)
        run(f, x, weights[0], y, quantize_x)
        error = 0.0
        if not quantize_x:
            expected = x.double() @ decode(f, weights[0], K).T
            error = float((y.double() - expected).norm() / expected.norm() / BOUND)
            if not error < 1:
                raise SystemExit(f"{f.name} M={M} K={K} N={N}: error {error:.3g} of its bound")
        median, spread = replay(
            [lambda w=w, x=x, y=y: run(f, x, w, y, quantize_x) for w in weights]
        )
        rows[M] = (median, spread, error)
    return rows


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x14336", "14336x4096", "4096x4096"])
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 256, 2048])
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=peers.PEERS,
        default=["int4pack"],
        help="also time these; with --quantize-x only mlx, by mx.qqmm",
    )
    parser.add_argument("--quantize-x", action="store_true", help="qqmm: mxfp8 and nvfp4 only")
    options = parser.parse_args()
    known = formats()
    if unknown := [name for name in options.formats if name not in known]:
        parser.error(f"--formats: {', '.join(unknown)}; expected some of {', '.join(known)}")
    run, rows = Library(options.library), []

    def add(who: str, K: int, N: int, M: int, median: float, spread: float, base: float, **more):
        rows.append({"who": who, "K": K, "N": N, "M": M, "us": median, "spread": spread, **more})
        print(
            f"{who:14} K {K:5} N {N:5} M {M:4}  {median:8.2f} us ± {spread:3.0%}  "
            f"{base / median:5.2f} times cuBLAS",
            flush=True,
        )

    shapes = [tuple(int(n) for n in shape.split("x")) for shape in options.shapes]
    for K, N in tqdm(shapes, disable=not sys.stderr.isatty()):
        dense = measure_torch(K, N, options.m)
        for M, (median, spread) in dense.items():
            add("torch bf16", K, N, M, median, spread, median)
        for peer in options.peers:
            timed = peers.measure(
                peer, peers.PEERS[peer], K, N, options.m, options.formats, options.quantize_x
            )
            for who, rows_of in timed:
                for M, (median, spread) in rows_of.items():
                    add(who, K, N, M, median, spread, dense[M][0])
        for name in options.formats:
            ours = measure_ours(run, known[name], K, N, options.m, options.quantize_x)
            for M, (median, spread, error) in ours.items():
                add(name, K, N, M, median, spread, dense[M][0], error=error)
    command.write(options.json, rows, __doc__)


if __name__ == "__main__":
    main()
