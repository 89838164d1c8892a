"""The host code of kernels/metal on Linux: compiled against the headers of MLX's Metal wheel,
linked with a mock of its device (host/), its kernels launched in the emulator."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import emulator
import mlx
import numpy as np
import oracle
from mlx_lowbit import _load
from mlx_lowbit.formats import Format

import kernels

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MLX = Path(mlx.__path__[0])
SOURCES = ("metal/launch.cpp", "metal/plan.cpp", "metal/source.cpp", "host/product_inputs.cpp")
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "uint32": 3, "uint8": 4, "int64": 5}


class Unavailable(RuntimeError):
    """No Metal wheel of MLX."""


@functools.cache
def wheel() -> Path:
    """The folder `mlx` of MLX's Metal wheel, of the version that the package is for.

    ``MLX_LOWBIT_MLX_METAL`` names an unpacked wheel; otherwise pip downloads it, once, into the
    emulator's build directory. Nothing of it is kept elsewhere.

    Raises:
        Unavailable: pip cannot get it.
    """
    if named := os.environ.get("MLX_LOWBIT_MLX_METAL"):
        return Path(named) / "mlx"
    folder = emulator.build_directory() / f"mlx-metal-{_load.MLX_VERSION}"
    if not folder.exists():
        making = folder.with_suffix(f".{os.getpid()}")
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--only-binary=:all:",
        ]
        command += ["--platform", "macosx_14_0_arm64", "-d", str(making)]
        done = subprocess.run(
            [*command, f"mlx-metal=={_load.MLX_VERSION}"], capture_output=True, text=True
        )
        if done.returncode:
            raise Unavailable(f"pip cannot download mlx-metal: {done.stderr.strip()[-300:]}")
        zipfile.ZipFile(next(making.glob("*.whl"))).extractall(making)
        with contextlib.suppress(OSError):  # another process was faster
            making.rename(folder)
    return folder / "mlx"


def flags() -> list[str]:
    include = wheel() / "include"
    return [
        *("-std=c++20", "-O1", "-w", "-fblocks", "-fPIC", '-DLOWBIT_BUILD="mock"'),
        *(f"-I{HERE / 'host' / 'stubs'}", f"-I{ROOT / 'kernels'}", f"-I{HERE / 'host'}"),
        *(f"-I{include}", f"-I{include / 'metal_cpp'}", "-DLOWBIT_METAL"),
    ]


def embedded() -> str:
    """files.cpp, which CMake writes."""
    rows = []
    for file in sorted((ROOT / "kernels").glob("*/*.h")):
        if file.parent.name in ("metal", "formats"):
            name = f"{file.parent.name}/{file.name}"
            rows.append(f'{{"{name}", R"metal({file.read_text()})metal"}},')
    return (
        "namespace lowbit::metal { struct File { const char *name, *text; };"
        f"extern const File kFiles[] = {{ {' '.join(rows)} {{nullptr, nullptr}} }}; }}"
    )


def build(change: Callable[[str], str] | None = None) -> Path:
    """The shared object of host code and mock; `change` makes another launch.cpp of its text."""
    parts = []
    for source in [*SOURCES, "mock", "driver", "files"]:
        if source in SOURCES:
            path = ROOT / "kernels" / source
            text = path.read_text()
            if change is not None and source == "metal/launch.cpp":
                changed = change(text)
                assert changed != text, "nothing was changed"
                text = changed
            beside = [f"-I{path.parent}"]
        elif source == "files":
            text, beside = embedded(), []
        else:
            name = "mock_device.cpp" if source == "mock" else "driver.cpp"
            text, beside = (HERE / "host" / name).read_text(), []
        # What a source includes decides too; hashing all headers is simpler than finding out.
        text = f"// {headers()}\n" + text
        parts.append(str(emulator.built(Path(source).stem, text, [*flags(), *beside])))
    libraries = MLX / "lib"
    link = [*parts, f"-L{libraries}", "-lmlx", f"-Wl,-rpath,{libraries}"]
    return emulator.built("host", "// " + " ".join(parts) + "\n", ["-shared", "-fPIC"], link)


@functools.cache
def headers() -> str:
    folders = [ROOT / "kernels" / "metal", ROOT / "kernels" / "host", HERE / "host"]
    return emulator.hash_of("".join(p.read_text() for f in folders for p in sorted(f.glob("*.h"))))


class _Buffer(ctypes.Structure):
    _fields_ = [("index", ctypes.c_int), ("data", ctypes.c_void_p), ("bytes", ctypes.c_size_t)]


class _Constant(ctypes.Structure):
    _fields_ = [("index", ctypes.c_int), ("is_bool", ctypes.c_int), ("value", ctypes.c_int)]


_Compile = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t
)
_Launch = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.POINTER(_Buffer), ctypes.c_int, ctypes.POINTER(_Constant),
    ctypes.c_int, ctypes.POINTER(ctypes.c_uint32), ctypes.POINTER(ctypes.c_uint32),
)  # fmt: skip


class _Callbacks(ctypes.Structure):
    _fields_ = [("compile", _Compile), ("launch", _Launch), ("most_threads", ctypes.c_size_t)]


class _Array(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("dtype", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("shape", ctypes.c_int * 4),
    ]


def _array(a: np.ndarray | None) -> _Array:
    if a is None:
        return _Array()
    assert a.flags.c_contiguous
    return _Array(a.ctypes.data, DTYPES[a.dtype.name], a.ndim, (ctypes.c_int * 4)(*a.shape))


class Refused(RuntimeError):
    """The device's compiler refused a kernel."""


@dataclass
class Host:
    """The backend on a mock device.

    Attributes:
        refuse: parts of entry points' names that the compiler refuses.
        most_threads: that pipelines have room for.
        launches: (entry, grid, threads, report) of what ran.
    """

    path: Path
    kind: emulator.Kind = "check"
    refuse: tuple[str, ...] = ()
    most_threads: int = 1024
    launches: list[tuple[str, tuple[int, ...], tuple[int, ...], emulator.Report]] = field(
        default_factory=list
    )
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._functions = ctypes.CDLL(str(self.path))
        self._functions.explain.restype = ctypes.c_char_p
        self._libraries: dict[str, emulator.Library] = {}
        self._callbacks = _Callbacks(_Compile(self._compile), _Launch(self._launch), 0)

    def _compile(self, name: bytes, text: bytes, message: int, length: int) -> int:
        entry = name.decode().removeprefix("lowbit_")
        try:
            if any(part in entry for part in self.refuse):
                raise emulator.MetalError("program_source:1:1: error: as the test wants it")
            self._libraries[entry] = emulator.compile(kernels.visible(text.decode()), self.kind)
        except emulator.MetalError as error:
            words = str(error).encode()[: length - 1]
            ctypes.memmove(message, words, len(words))
            return 0
        return 1

    def _launch(self, entry, buffers, count, constants, constant_count, grid, threads) -> None:
        # An exception would be lost between here and the caller.
        try:
            views = {}
            for b in buffers[:count]:
                memory = (ctypes.c_char * b.bytes).from_address(b.data) if b.bytes else b""
                views[b.index] = np.frombuffer(memory, np.uint8)
            values = {
                c.index: bool(c.value) if c.is_bool else c.value for c in constants[:constant_count]
            }
            library = self._libraries[entry.decode()]
            if entry == b"group":
                values = {}  # its source declares none
            sizes = tuple(grid[:3]), tuple(threads[:3])
            report = library.launch(
                entry.decode(), views, threadgroups=sizes[0], threads=sizes[1], constants=values
            )
            self.launches.append((entry.decode(), *sizes, report))
            if report.problems:
                self.errors.append(report.messages)
        except Exception as error:
            self.errors.append(f"{type(error).__name__}: {error}")

    def _call(self, function: str, *arguments) -> None:
        self._callbacks.most_threads = self.most_threads
        self._functions.set_callbacks(ctypes.byref(self._callbacks))
        message = ctypes.create_string_buffer(4096)
        self.launches.clear()
        self.errors.clear()
        status = getattr(self._functions, function)(
            *arguments, message, ctypes.c_size_t(len(message))
        )
        if status:
            raise (Refused if status == 1 else RuntimeError)(message.value.decode())
        if self.errors:
            raise AssertionError("\n".join(self.errors))

    def product(
        self,
        fmt: Format,
        x: np.ndarray,
        w: oracle.Weight,
        *,
        transpose: bool = True,
        quantize_x: bool = False,
        bias: np.ndarray | None = None,
        global_scale_x: float | None = None,
        global_scale: float | None = None,
        lhs: np.ndarray | None = None,
        rhs: np.ndarray | None = None,
    ) -> np.ndarray:
        """y of x [M, K] or, with `rhs`, of pairs of matrices of x and w."""
        N = w.words.shape[-2] if transpose else w.words.shape[-1] * 32 // fmt.bits
        shape = (len(rhs), x.shape[-2], N) if rhs is not None else (x.shape[0], N)
        y = kernels.poisoned(shape, x.dtype)
        scalars = [None if g is None else np.float32([g]) for g in (global_scale_x, global_scale)]
        all_inputs = [x, w.words, w.scales, w.biases, bias, *scalars, lhs, rhs]
        inputs = (_Array * 9)(*map(_array, all_inputs))
        self._call(
            "product", fmt.id, int(transpose), int(quantize_x), inputs, ctypes.byref(_array(y))
        )
        return y

    def quantize(self, fmt: Format, w: np.ndarray, global_scale: float | None = None):
        """w [rows, K] as the kernel quantizes it."""
        rows, K = w.shape
        scale = w.dtype if fmt.has_biases else np.dtype(np.uint8)
        codes = kernels.poisoned((rows, K * fmt.bits // 32), np.dtype(np.uint32))
        scales = kernels.poisoned((rows, K // fmt.group_size), scale)
        outputs = [codes, scales]
        if fmt.has_biases:
            outputs.append(kernels.poisoned(scales.shape, scale))
        given = None if global_scale is None else np.float32([global_scale])
        inputs = (_Array * 2)(_array(w), _array(given))
        into = (_Array * 3)(*map(_array, outputs))
        self._call("elements", fmt.id, 1, inputs, into, len(outputs))
        return oracle.Weight(*outputs, *([] if fmt.has_biases else [None]))

    def dequantize(
        self, fmt: Format, w: oracle.Weight, dtype: np.dtype, global_scale: float | None = None
    ) -> np.ndarray:
        """The values of w."""
        shape = (*w.words.shape[:-1], w.words.shape[-1] * 32 // fmt.bits)
        values = kernels.poisoned(shape, dtype)
        given = None if global_scale is None else np.float32([global_scale])
        inputs = (_Array * 4)(*map(_array, [w.words, w.scales, w.biases, given]))
        self._call("elements", fmt.id, 0, inputs, ctypes.byref(_array(values)), 1)
        return values

    def explain(self, fmt: Format, M: int, N: int, K: int) -> str:
        sizes = [ctypes.c_int64(n) for n in (M, N, K)]
        return self._functions.explain(fmt.id, 2, *sizes).decode()
