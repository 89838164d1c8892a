"""quantize and dequantize on an NVIDIA GPU, beside a copy of as many bytes.

    python -m benchmarks.cuda.quantize --library BUILD/kernels/cuda/liblowbit_cuda_library.so

Times are CUDA-graph replays over copies enough to read and write four times the L2 cache. Of
bfloat16 [N, K]: a copy reads and writes half of the bytes that quantize and dequantize read and
write together, and torch's `copy_` takes as long as anything does.
"""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path

import torch

from . import command
from .timing import DEVICE, copies, replay
from .weights import Format, Weights, formats, random_weights


class Library:
    def __init__(self, path: Path):
        self.run = ctypes.CDLL(str(path.resolve())).lowbit_quantize
        pointer = ctypes.c_void_p
        self.run.argtypes = [
            ctypes.c_int, ctypes.c_int, ctypes.c_int64, *[pointer] * 4, ctypes.c_bool, pointer,
        ]  # fmt: skip

    def __call__(self, f: Format, x: torch.Tensor, w: Weights, back: bool) -> None:
        """w <- x, or, ``back``, x <- w, on torch's current stream."""
        stream = torch.cuda.current_stream().cuda_stream
        status = self.run(f.id, 2, x.numel() // f.group, x.data_ptr(), *w.pointers(), back, stream)
        if status:
            raise RuntimeError(f"{f.name}: CUDA error {status}")


def operands(f: Format, N: int, K: int) -> tuple[torch.Tensor, Weights]:
    return torch.randn(N, K, device=DEVICE).bfloat16(), random_weights(f, N, K=K)


def time_copy(nbytes: int) -> float:
    half = nbytes // 2
    every = [torch.empty(2, half, dtype=torch.uint8, device=DEVICE) for _ in range(copies(nbytes))]
    return replay([partial(pair[0].copy_, pair[1]) for pair in every])[0]


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x14336"], help="KxN")
    options = parser.parse_args()
    known = formats()
    if unknown := [name for name in options.formats if name not in known]:
        parser.error(f"--formats: {', '.join(unknown)}; expected some of {', '.join(known)}")
    run, rows = Library(options.library), []
    torch.manual_seed(0)
    for shape in options.shapes:
        K, N = (int(n) for n in shape.split("x"))
        for name in options.formats:
            f = known[name]
            every = [operands(f, N, K)]
            nbytes = 2 * N * K + every[0][1].nbytes()
            every += [operands(f, N, K) for _ in range(copies(nbytes) - 1)]
            copy = time_copy(nbytes)
            for back in (False, True):
                median, spread = replay([partial(run, f, x, w, back) for x, w in every])
                what = "dequantize" if back else "quantize"
                rows.append(
                    {
                        "who": name, "what": what, "K": K, "N": N, "bytes": nbytes,
                        "us": median, "spread": spread, "copy_us": copy,
                    }
                )  # fmt: skip
                print(
                    f"{name:12} K {K} N {N} {what:10} {median:7.1f} us ± {spread:3.0%}  "
                    f"{nbytes / median / 1e6:5.2f} TB/s, {copy / median:4.0%} of a copy's speed",
                    flush=True,
                )
    command.write(options.json, rows, __doc__)


if __name__ == "__main__":
    main()
