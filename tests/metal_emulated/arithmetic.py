"""Counts the floating-point operations of an emulated kernel: LLVM's, as its text has them.

Every basic block of the unvectorized code gets an addition of its own operations to a counter. A
multiply-add counts as two, a vector operation as its elements; conversions, comparisons and integer
arithmetic count as none. A simdgroup matrix product is 32 operations a lane, as on a GPU; a
``simd_sum`` is the emulator's 31 additions a lane.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

FLAGS = ["-S", "-emit-llvm", "-fno-vectorize", "-fno-slp-vectorize"]
_OPERATION = re.compile(
    r"= (?:tail )?(?:(?P<plain>fadd|fsub|fmul|fdiv)(?: \w+)* |call (?:\w+ )*(?=.*@llvm\.(?P<fused>fma|fmuladd)))"
    r"(?P<type><(?P<lanes>\d+) x \w+>|\w+)"
)
_COUNTER = "msl_arithmetic"


def operations(line: str) -> int:
    """Floating-point operations of an instruction."""
    found = _OPERATION.search(line)
    if not found:
        return 0
    return int(found["lanes"] or 1) * (2 if found["fused"] else 1)


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """The lines of a function cut before its labels."""
    block: list[str] = []
    for line in lines:
        if re.match(r"[\w.$-]+:", line) and block:
            yield block
            block = []
        block.append(line)
    yield block


def _counted(block: list[str], name: str) -> list[str]:
    count = sum(map(operations, block))
    if not count:
        return block
    # After the label and the phi nodes, which must come first.
    at = next(
        i for i, line in enumerate(block)
        if line.startswith("  ") and not re.match(r"  %\S+ = phi ", line)
    )  # fmt: skip
    add = [
        f"  %{name}.before = load i64, ptr @{_COUNTER}",
        f"  %{name}.after = add i64 %{name}.before, {count}",
        f"  store i64 %{name}.after, ptr @{_COUNTER}",
    ]
    return block[:at] + add + block[at:]


def count(text: str) -> str:
    """LLVM's text of a module, with the counting added."""
    out: list[str] = []
    body: list[str] | None = None
    number = 0
    for line in text.splitlines():
        if body is None:
            out.append(line)
            if line.startswith("define "):
                body = []
        elif line == "}":
            for block in _blocks(body):
                number += 1
                out += _counted(block, f"count{number}")
            out.append(line)
            body = None
        else:
            body.append(line)
    return "\n".join([*out, f"@{_COUNTER} = external global i64", ""])
