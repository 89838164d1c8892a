"""Stands in for the extension on a Mac where that could not be built or loaded.

The formats are there, kernels are not: every operation runs MLX's own op, and ``doctor`` says why.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

build = "none"
cuda_build = "the extension is missing"
has_metal = False
# Scale bytes of groups that are not finite: NaN of E4M3 and of E8M0.
_NAN_SCALES = {"affine": None, "nvfp4": 0x7F}
_ROW = re.compile(r"^FORMAT\((\w+), [^,]+, (\w+), (\d+), (\d+), (true|false)\)", re.M)


class KernelRefused(RuntimeError):
    """Never raised here: nothing is compiled."""


def formats() -> list[tuple[str, str, int, int, bool, int | None]]:
    """(name, mode, bits, group size, judged, nan scale) of formats.def's rows."""
    text = Path(__file__).with_name("formats.def").read_text()
    return [
        (name, mode, int(bits), int(group), judged == "true", _NAN_SCALES.get(mode, 0xFF))
        for name, mode, bits, group, judged in _ROW.findall(text)
    ]


def target() -> str:
    """Of the instruction sets, none."""
    return "none"


def targets() -> list[str]:
    return []


def threads() -> int:
    return 0


def same_array(a: mx.array) -> mx.array:
    return a


def same_arrays(*pairs: Any) -> bool:
    """Whether each second argument is the one before it."""
    return all(a is b for a, b in zip(pairs[::2], pairs[1::2], strict=True))


def is_tracer(a: mx.array) -> bool:
    return False


def unchanged(*_: Any) -> bool:
    """That anything was, is not known."""
    return False
