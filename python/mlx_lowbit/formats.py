"""The formats that this package multiplies with, as the extension lists them.

The numbers come from ``kernels/formats/formats.def``; nothing here repeats them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from . import _ext

__all__ = ["FORMATS", "Format", "MissingFormatError", "find", "get"]


@dataclass(frozen=True)
class Format:
    """One way to store a weight.

    Attributes:
        name: e.g. ``affine4_g64`` or ``nvfp4``.
        mode: ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``, as in ``mx.quantize``.
        bits: bits of one code.
        group_size: codes that share a scale.
        id: position in the registry; what the extension takes.
        judged: whether the format carries speed bars.
        nan_scale: the scale byte of a group that holds a NaN or an infinity; None in mode affine,
            whose scale is NaN itself.
    """

    name: str
    mode: str
    bits: int
    group_size: int
    id: int
    judged: bool
    nan_scale: int | None

    @property
    def has_biases(self) -> bool:
        return self.mode == "affine"

    @property
    def storage_bits(self) -> float:
        """Bits a weight, scales (and biases) included, with 16-bit affine scales."""
        return self.bits + (32 if self.has_biases else 8) / self.group_size


class MissingFormatError(ValueError):
    """A format that MLX knows and this package has no kernel for."""


FORMATS: tuple[Format, ...] = tuple(
    Format(name, mode, bits, group_size, index, judged, nan_scale)
    for index, (name, mode, bits, group_size, judged, nan_scale) in enumerate(_ext.formats())
)

_MODES = tuple(dict.fromkeys(f.mode for f in FORMATS))
_BY_KEY = {(f.mode, f.bits, f.group_size): f for f in FORMATS}
# mx.quantize's defaults where a mode offers a choice.
_DEFAULTS = {"affine": (4, 64)}
_MLX_ONLY = {("affine", 1)}  # (mode, bits) that only MLX's own op takes


def _choices(values) -> str:
    return ", ".join(str(v) for v in sorted(set(values)))


def get(mode: str = "affine", bits: int | None = None, group_size: int | None = None) -> Format:
    """The format of a mode, with MLX's defaults for what is None.

    Raises:
        ValueError: an unknown mode, or bits or a group size that the mode does not have; the
            message names the argument and what would do.
        MissingFormatError: MLX has the format, this package has no kernel for it.
    """
    try:
        return _get(mode, bits, group_size)
    except TypeError:  # an argument that cannot be hashed
        return _get.__wrapped__(mode, bits, group_size)


@lru_cache(maxsize=256, typed=True)
def _get(mode: str, bits: int | None, group_size: int | None) -> Format:
    if mode not in _MODES:
        raise ValueError(f"mode must be one of {', '.join(_MODES)}, got {mode!r}")
    own = [f for f in FORMATS if f.mode == mode]
    default_bits, default_group = _DEFAULTS.get(mode, (own[0].bits, own[0].group_size))
    bits = default_bits if bits is None else bits
    group_size = default_group if group_size is None else group_size
    whole = all(isinstance(v, int) and not isinstance(v, bool) for v in (bits, group_size))
    found = _BY_KEY.get((mode, bits, group_size)) if whole else None
    if found is not None:
        return found
    if group_size not in {f.group_size for f in own}:
        groups = _choices(f.group_size for f in own)
        raise ValueError(f"group_size must be one of {groups} in mode {mode}, got {group_size!r}")
    kind = MissingFormatError if whole and (mode, bits) in _MLX_ONLY else ValueError
    raise kind(f"bits must be one of {_choices(f.bits for f in own)} in mode {mode}, got {bits!r}")


def find(mode: str, bits: int | None, group_size: int | None) -> Format | None:
    """Like :func:`get`, with None instead of an exception."""
    try:
        return get(mode, bits, group_size)
    except ValueError:
        return None
