"""Random weights of a format on the device, and what their bits say."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .timing import DEVICE

# As in kernels/formats/formats.def, which this file reads: name, mode, bits, group size.
FORMATS_DEF = Path(__file__).parents[2] / "kernels" / "formats" / "formats.def"
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
BOUND = 2.0**-8
"""Of the relative error in the Frobenius norm of a bfloat16 product."""


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
    """Codes uint8 [..., N, K * bits / 8], scales and biases [..., N, K / group]."""

    codes: torch.Tensor
    scales: torch.Tensor
    biases: torch.Tensor | None

    def __getitem__(self, i: int) -> Weights:
        """Matrix ``i`` of those of the first dimension."""
        biases = None if self.biases is None else self.biases[i]
        return Weights(self.codes[i], self.scales[i], biases)

    def pointers(self) -> list[int | None]:
        """Addresses of codes, scales and biases."""
        parts = (self.codes, self.scales, self.biases)
        return [None if p is None else p.data_ptr() for p in parts]

    def nbytes(self) -> int:
        parts = (self.codes, self.scales, self.biases)
        return sum(p.numel() * p.element_size() for p in parts if p is not None)


def random_weights(f: Format, *rows: int, K: int) -> Weights:
    """``rows``: the dimensions before K, N the last of them."""
    codes = torch.randint(0, 256, (*rows, K * f.bits // 8), dtype=torch.uint8, device=DEVICE)
    shape = (*rows, K // f.group)
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
