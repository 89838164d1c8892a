"""What is timed: layers of real models, numbers of tokens, formats, dtypes. Knows no device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_lowbit.formats import Format


@dataclass(frozen=True)
class Shape:
    """One layer: y[M, n] = x[M, k] @ w[n, k].T; with experts one such w each, top_k a token."""

    name: str
    k: int
    n: int
    experts: int = 0
    top_k: int = 0

    @property
    def label(self) -> str:
        """The shape as given to ``--shapes``: ``KxN``."""
        return f"{self.k}x{self.n}"


# Real mixtures hold 128 experts and more; 16 keep one layer under 0.2 GB in bfloat16.
SHAPES = (
    Shape("mistral-7b.attention", 4096, 4096),
    Shape("mistral-7b.up", 4096, 14336),
    Shape("mistral-7b.down", 14336, 4096),
    Shape("llama-7b.up", 4096, 11008),
    Shape("qwen3-asr-1.7b.up", 2048, 6144),
    Shape("qwen3-asr-1.7b.down", 6144, 2048),
    Shape("qwen3-asr-0.6b.up", 1024, 3072),
    Shape("glm-4.5-air.expert-up", 4096, 1408, experts=16, top_k=4),
    Shape("glm-4.5-air.expert-down", 1408, 4096, experts=16, top_k=4),
)
DEFAULT_SHAPES = (
    "mistral-7b.attention",
    "mistral-7b.up",
    "mistral-7b.down",
    "glm-4.5-air.expert-up",
)
QUICK_SHAPES = ("mistral-7b.attention", "glm-4.5-air.expert-up")

MATVEC_M = (1, 2, 4, 8)
MATMUL_M = (16, 64, 512)
# Numbers of tokens of the ops that have no split by M. For gather, M counts tokens: M * top_k rows
# are multiplied.
OTHER_M = {"qqmm": (1, 8, 64, 512), "gather": (1, 8, 64), "linear": (1, 8, 64, 512)}
OPS = ("matvec", "matmul", "qqmm", "gather", "linear", "quantize", "dequantize")
DTYPES = ("bfloat16", "float16", "float32")
DENSE = "dense"  # the format column of the linear rows
QQMM_MODES = ("mxfp8", "nvfp4")


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    op: str
    format: str
    dtype: str
    m: int  # 0 where the op has no tokens
    shape: Shape

    @property
    def flops(self) -> int:
        """Multiplications and additions of one call; 0 for quantize and dequantize."""
        return 2 * self.m * self.shape.k * self.shape.n * max(1, self.shape.top_k)

    @property
    def label(self) -> str:
        """One line that names the case."""
        tokens = f" M={self.m}" if self.m else ""
        return f"{self.op} {self.format} {self.dtype}{tokens} {self.shape.label}"


@dataclass(frozen=True)
class Selection:
    """What the command line asks for; an empty tuple of ``m`` means each op's own list."""

    ops: Sequence[str]
    formats: Sequence[Format]
    shapes: Sequence[Shape]
    dtypes: Sequence[str]
    m: Sequence[int] = ()


def enumerate_cases(selection: Selection) -> Iterator[Case]:
    """Yields the cases grouped by shape, dtype and format, M ascending.

    So weights are made once a group, and a library's cost at small M is known before a larger one.
    """
    for shape in selection.shapes:
        for dtype in selection.dtypes:
            if "linear" in selection.ops and not shape.experts:
                for m in selection.m or OTHER_M["linear"]:
                    yield Case("linear", DENSE, dtype, m, shape)
            for fmt in selection.formats:
                if shape.k % fmt.group_size == 0:
                    yield from _format_cases(selection, fmt, dtype, shape)


def _format_cases(selection: Selection, fmt: Format, dtype: str, shape: Shape) -> Iterator[Case]:
    if shape.experts:
        if "gather" in selection.ops:
            for m in selection.m or OTHER_M["gather"]:
                yield Case("gather", fmt.name, dtype, m, shape)
        return
    for m in sorted(selection.m or MATVEC_M + MATMUL_M):
        op = "matvec" if m <= max(MATVEC_M) else "matmul"
        if op in selection.ops:
            yield Case(op, fmt.name, dtype, m, shape)
    if "qqmm" in selection.ops and fmt.mode in QQMM_MODES:
        for m in sorted(selection.m or OTHER_M["qqmm"]):
            yield Case("qqmm", fmt.name, dtype, m, shape)
    for op in ("quantize", "dequantize"):
        if op in selection.ops:
            yield Case(op, fmt.name, dtype, 0, shape)


def select_shapes(names: str) -> tuple[Shape, ...]:
    """The shapes named by a comma-separated list of names, prefixes of names, ``KxN``, or ``all``.

    A ``KxN`` that no model here has is accepted as a shape of its own.

    Raises:
        ValueError: a part that is neither a known name nor ``KxN`` with positive K and N.
    """
    if names == "all":
        return SHAPES
    found: list[Shape] = []
    for part in names.split(","):
        known = [s for s in SHAPES if s.name.startswith(part) or s.label == part]
        sides = part.split("x")
        if not known and len(sides) == 2 and all(s.isdigit() and int(s) > 0 for s in sides):
            known = [Shape(part, int(sides[0]), int(sides[1]))]
        if not known:
            expected = ", ".join(s.name for s in SHAPES)
            raise ValueError(f"shapes: expected KxN, all or one of {expected}; got {part!r}")
        found += [s for s in known if s not in found]
    return tuple(found)


def select_formats(names: str, registry: Sequence[Format]) -> tuple[Format, ...]:
    """The formats named by ``judged``, ``all`` or a comma-separated list of names.

    Raises:
        ValueError: a name that the registry does not have.
    """
    if names in ("judged", "all"):
        return tuple(f for f in registry if f.judged or names == "all")
    by_name = {f.name: f for f in registry}
    for name in names.split(","):
        if name not in by_name:
            raise ValueError(
                f"formats: expected judged, all or names out of {', '.join(by_name)}; got {name!r}"
            )
    return tuple(by_name[name] for name in names.split(","))
