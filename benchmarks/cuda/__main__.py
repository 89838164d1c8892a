"""Products on an NVIDIA GPU, kernels alone: ours, cuBLAS (torch, bfloat16) and peers.

    cmake --build BUILD --target lowbit_cuda_library
    python -m benchmarks.cuda --library BUILD/kernels/cuda/liblowbit_cuda_library.so

Times are CUDA-graph replays, microseconds a call, over as many copies of the weights as make four
times the L2 cache: the median of nine replays, and their spread. Results are compared with a
float64 product of decoded bits first; a wrong one is not timed. Needs torch with CUDA; `--peers`
adds torch's int4pack, humming-kernels and MLX's own products where they are installed.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.files import write_json

from . import peers
from .timing import DEVICE, Rows, copies, replay

# As in kernels/formats/formats.def, which this file reads: name, mode, bits, group size.
FORMATS_DEF = Path(__file__).parents[2] / "kernels" / "formats" / "formats.def"
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
BOUND = 2.0**-8


@dataclass(frozen=True)
class Format:
    id: int
    name: str
    mode: str
    bits: int
    group: int


def formats() -> dict[str, Format]:
    rows = [
        [cell.strip() for cell in line[len("FORMAT(") : -1].split(",")]
        for line in FORMATS_DEF.read_text().splitlines()
        if line.startswith("FORMAT(")
    ]
    return {
        name: Format(i, name, mode, int(bits), int(group))
        for i, (name, _type, mode, bits, group, _judged) in enumerate(rows)
    }


@dataclass
class Weights:
    """One copy: codes uint8 [N, K * bits / 8], scales and biases [N, K / group]."""

    codes: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor | None

    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.biases)
        return sum(p.numel() * p.element_size() for p in parts if p is not None)


def random_weights(f: Format, N: int, K: int) -> Weights:
    codes = torch.randint(0, 256, (N, K * f.bits // 8), dtype=torch.uint8, device=DEVICE)
    shape = (N, K // f.group)
    if f.mode == "affine":
        scales = ((torch.rand(shape, device=DEVICE) - 0.5) * 0.02).bfloat16()
        middle = -scales.float() * 2 ** (f.bits - 1)
        noise = torch.randn(shape, device=DEVICE) * 0.005
        return Weights(codes, scales, (middle + noise).bfloat16())
    if f.bits == 8:  # no NaN codes
        codes = torch.where((codes & 0x7F) == 0x7F, codes & 0xFE, codes)
    low, high = (1, 90) if f.group == 16 else (115, 125)
    return Weights(codes, torch.randint(low, high, shape, dtype=torch.uint8, device=DEVICE), None)


def decode(f: Format, w: Weights, K: int) -> torch.Tensor:
    """float64 [N, K], from the bits."""
    N = w.codes.shape[0]
    bits = (w.codes.long().unsqueeze(-1) >> torch.arange(8, device=DEVICE)) & 1
    codes = (bits.reshape(N, K, f.bits) << torch.arange(f.bits, device=DEVICE)).sum(-1)
    groups = (N, K // f.group, f.group)
    if f.mode == "affine":
        values = codes.double().reshape(groups) * w.scales.double().unsqueeze(-1)
        return (values + w.biases.double().unsqueeze(-1)).reshape(N, K)
    if f.bits == 4:
        table = torch.tensor([*E2M1, *(-v for v in E2M1)], dtype=torch.float64, device=DEVICE)
        values = table[codes]
    else:
        values = codes.to(torch.uint8).view(torch.float8_e4m3fn).double()
    if f.group == 16:
        scales = w.scales.view(torch.float8_e4m3fn).double()
    else:
        scales = torch.exp2(w.scales.double() - 127)
    return (values.reshape(groups) * scales.unsqueeze(-1)).reshape(N, K)


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
        at = [p.data_ptr() if p is not None else None for p in (w.codes, w.scales, w.biases, x, y)]
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
    weights = [random_weights(f, N, K)]
    weights += [random_weights(f, N, K) for _ in range(copies(weights[0].nbytes()) - 1)]
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", type=Path, required=True)
    parser.add_argument(
        "--formats",
        nargs="+",
        default=["affine4_g64", "affine3_g64", "affine8_g64", "mxfp8", "nvfp4"],
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x14336", "14336x4096", "4096x4096"])
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 256, 2048])
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, default=["int4pack"])
    parser.add_argument("--quantize-x", action="store_true", help="qqmm: mxfp8 and nvfp4 only")
    parser.add_argument("--json", type=Path)
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
            for who, rows_of in peers.measure(peer, K, N, options.m, options.formats).items():
                for M, (median, spread) in rows_of.items():
                    add(who, K, N, M, median, spread, dense[M][0])
        for name in options.formats:
            ours = measure_ours(run, known[name], K, N, options.m, options.quantize_x)
            for M, (median, spread, error) in ours.items():
                add(name, K, N, M, median, spread, dense[M][0], error=error)
    if options.json:
        about = {
            "device": torch.cuda.get_device_name(0),
            "date": datetime.date.today().isoformat(),
            "versions": peers.versions(),
            "cuda": torch.version.cuda,
            "method": __doc__,
        }
        write_json(options.json, {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
