"""Metal kernels on Linux: type-checked against real address spaces, run thread by thread, checked.

    library = compile(source, "check", include=[...])
    report = library.launch("kernel", {0: x, 1: y}, threadgroups=(4, 1, 1), threads=(64, 1, 1))
    assert not report.problems, report.messages

This is clang and an emulator, not Apple's compiler and not a GPU. README.md says what that shows.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import arithmetic
import numpy as np
from preprocess import MetalError, translate

HERE = Path(__file__).parent
ORDERS = ("forward", "reverse", "per_barrier", "per_rendezvous", "greedy")
MOST_BUFFERS = 32
COMPILER = os.environ.get("MLX_LOWBIT_CLANG", "clang++-19")
# -fconvergent-functions: a SIMD-group operation must not move into a branch on the lane.
# -fno-optimize-sibling-calls: return addresses name the call sites that lanes meet at.
# single precision constants, no excess precision: as in Metal.
FLAGS = [
    *("-std=c++17", "-O2", "-g1", "-march=x86-64-v3", "-fPIC", "-fno-exceptions", "-fno-rtti"),
    *("-D__METAL_VERSION__=310", f"-I{HERE / 'shim'}", "-Wno-c++11-narrowing"),
    *("-fconvergent-functions", "-fno-optimize-sibling-calls", "-ffp-contract=on"),
    *("-Xclang", "-cl-single-precision-constant"),
    *("-Xclang", "-ffloat16-excess-precision=none"),
    *("-Xclang", "-fbfloat16-excess-precision=none"),
]
# The callbacks that the instrumentation calls are checks.cpp's.
INSTRUMENTED = ["-fsanitize=thread", "-mllvm", "-tsan-instrument-func-entry-exit=0"]

Kind = Literal["run", "check", "count"]


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if shutil.which(COMPILER) is None:
        return f"{COMPILER} is not installed (Debian: clang-19 libclang-rt-19-dev)"
    return None


@dataclass(frozen=True)
class Report:
    """What a launch showed.

    Attributes:
        problems: races, accesses out of bounds, SIMD-group operations that not all lanes reach,
            barriers that not all threads reach, more than 32 KiB of threadgroup memory.
        messages: the first eight, with source lines where llvm-symbolizer-19 is installed.
        read, written: bytes by buffer, all threads together; of a `check` library only.
        arithmetic: floating-point operations of all threads; of a `count` library only.
    """

    problems: int
    messages: str
    simd_operations: int
    barriers: int
    divergent: int
    threadgroup_bytes: int
    read: dict[int, int]
    written: dict[int, int]
    arithmetic: int


class _Buffer(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


def build_directory() -> Path:
    """Where libraries are kept, by the hash of their text: one of the user's, made once."""
    return Path(tempfile.gettempdir()) / f"mlx_lowbit-metal-{os.getuid()}"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def built(
    stem: str, text: str, flags: Sequence[str], link: Sequence[str] = (), suffix: str = ".cpp"
) -> Path:
    """The object (or, with `link`, the shared object) of a C++ text, kept by its hash."""
    key = hashlib.sha256("\0".join([text, COMPILER, *flags, *link]).encode()).hexdigest()[:24]
    directory = build_directory()
    directory.mkdir(mode=0o700, exist_ok=True)
    result = directory / f"{stem}-{key}{'.so' if link else '.o'}"
    if result.exists():
        return result
    source = directory / f"{stem}-{key}-{os.getpid()}{suffix}"
    source.write_text(text)
    made = result.with_suffix(f".{os.getpid()}")
    done = _run([COMPILER, *flags, *([] if link else ["-c"]), str(source), *link, "-o", str(made)])
    source.unlink()
    if done.returncode:
        raise MetalError(done.stderr)
    os.replace(made, result)
    return result


@functools.cache
def _runtime() -> list[str]:
    """The objects of the runtime."""
    shared = "".join(p.read_text() for p in [HERE / "runtime.h", HERE / "shim" / "msl_rt.h"])
    plain = ["-std=c++17", "-O2", "-g1", "-march=x86-64-v3", "-fPIC", f"-I{HERE}"]
    return [
        str(built(stem, f"// {hash_of(shared)}\n" + (HERE / f"{stem}.cpp").read_text(), plain))
        for stem in ("runtime", "checks")
    ]


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def typecheck(source: str, name: str = "kernel.metal", include: Sequence[Path] = ()) -> None:
    """Refuses what the type check finds, with Metal's address spaces.

    Raises:
        MetalError: the errors, a line each.
    """
    text = translate(source, name, include, address_spaces=True)
    with tempfile.NamedTemporaryFile("w", suffix=".cpp") as file:
        file.write(text)
        file.flush()
        warn = ["-Wno-everything", "-Wno-c++11-narrowing", "-Wimplicit-float-conversion"]
        command = [COMPILER, *FLAGS, "-DMSL_ADDRESS_SPACES", "-fsyntax-only", *warn, file.name]
        done = _run(command)
    # Metal has no implicit conversion to bfloat; clang only warns.
    wrong = re.findall(r".*(?:error:|warning: implicit conversion.*to 'bfloat).*", done.stderr)
    if wrong or done.returncode:
        raise MetalError("\n".join(wrong) or done.stderr)


def compile(
    source: str, kind: Kind = "run", name: str = "kernel.metal", include: Sequence[Path] = ()
) -> Library:
    """A library of the kernels of a source.

    `check` finds races and bounds and counts bytes; `count` counts arithmetic (arithmetic.py).

    Raises:
        MetalError: what the compiler said.
    """
    shim = hash_of("".join(p.read_text() for p in sorted((HERE / "shim").iterdir())))
    text = f"// {shim}\n" + translate(source, name, include)
    flags = [*FLAGS, "-w", *(INSTRUMENTED if kind == "check" else [])]
    if kind == "count":
        plain = built("kernel", text, [*flags, *arithmetic.FLAGS]).read_text()
        counted = arithmetic.count(plain)
        return linked([str(built("counted", counted, ["-w", "-O2", "-fPIC"], suffix=".ll"))], kind)
    return linked([str(built("kernel", text, flags))], kind)


def linked(objects: Sequence[str], kind: Kind) -> Library:
    """A library of objects that register their kernels."""
    # compiler-rt rounds float to bfloat16; libgcc of Debian 12 cannot.
    parts = [*objects, *_runtime(), "--rtlib=compiler-rt", "-ldl", "-lm", "-lgcc_s"]
    names = " ".join(Path(o).name for o in objects)
    return Library(built("library", f"// {names}\n", ["-shared", "-fPIC"], parts), kind)


class Library:
    """Kernels that can be launched."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self._functions = ctypes.CDLL(str(path))
        self.kind = kind

    def kernels(self) -> list[str]:
        """Their names."""
        text = ctypes.create_string_buffer(1 << 20)
        self._functions.msl_list_kernels(text, len(text))
        return text.value.decode().split()

    def launch(
        self,
        kernel: str,
        buffers: Mapping[int, Any],
        *,
        threadgroups: tuple[int, int, int],
        threads: tuple[int, int, int],
        constants: Mapping[int, bool | int | float] | None = None,
        order: str = "greedy",
        seed: int = 0,
    ) -> Report:
        """Runs every thread of a grid.

        Args:
            buffers: by index; numpy arrays, which are written in place, or bytes of constants.
                Indices that are not there have a buffer of no bytes.
            constants: values of the function constants, by index.
            order: of threads: `greedy` lets one random SIMD-group run as far as it can.

        Raises:
            KeyError: no such kernel, or no such function constant.
        """
        for index, value in (constants or {}).items():
            packed = struct.pack(
                "?" if isinstance(value, bool) else "<i" if isinstance(value, int) else "<f", value
            )
            if not self._functions.msl_set_constant(index, packed, len(packed)):
                raise KeyError(f"no function constant {index}")
        count = max(buffers, default=-1) + 1
        table = (_Buffer * max(count, 1))()
        keep = []
        for index, value in buffers.items():
            array = np.frombuffer(bytearray(value), np.uint8) if isinstance(value, bytes) else value
            if not array.flags.c_contiguous:
                raise ValueError(f"buffer {index} must be contiguous")
            keep.append(array)
            table[index] = _Buffer(array.ctypes.data, array.nbytes)
        messages, stats = ctypes.create_string_buffer(8192), (ctypes.c_long * 4)()
        traffic = (ctypes.c_long * (2 * MOST_BUFFERS))()
        operations = ctypes.c_long.in_dll(self._functions, "msl_arithmetic")
        operations.value = 0
        sizes = [(ctypes.c_uint * 3)(*threadgroups), (ctypes.c_uint * 3)(*threads)]
        problems = self._functions.msl_launch(
            kernel.encode(), table, count, *sizes, ORDERS.index(order), seed,
            int(self.kind == "check"), 1, messages, len(messages), stats, traffic,
        )  # fmt: skip
        if problems < 0:
            raise KeyError(f"no kernel {kernel}; there are {self.kernels()}")
        return Report(
            problems,
            _with_source_lines(messages.value.decode()),
            *stats,
            read={i: traffic[2 * i] for i in range(count)},
            written={i: traffic[2 * i + 1] for i in range(count)},
            arithmetic=operations.value,
        )


def _with_source_lines(text: str) -> str:
    tool = shutil.which("llvm-symbolizer-19") or shutil.which("llvm-symbolizer")

    def line(found: re.Match[str]) -> str:
        options = ["--functions=none", "--no-inlines", "--basenames", f"--obj={found[1]}"]
        first = _run([str(tool), *options, found[2]]).stdout.strip().split("\n")[0]
        return found[0] if not first or first.startswith("??") else first

    return re.sub(r"(\S+\.so)\+(0x[0-9a-f]+)", line, text) if tool else text
