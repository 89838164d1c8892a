"""The small trained model that ships with the package, and the text it was trained on.

``config.json``, ``model.safetensors`` and the tokenizer files in ``DIRECTORY`` are a Llama-shaped
model over bytes: token ids 0 to 255 are byte values, ``END_OF_FILE`` ends a file. They are kept in
``benchmarks/demo_model`` and installed beside this module.
``benchmarks/train_demo_model.py`` made them from the sources of the Python standard library,
leaving out the files for which :func:`is_held_out` holds. ``held_out.json`` lists those files,
``training.json`` says how it was trained.
"""

from __future__ import annotations

import json
import sysconfig
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

_PACKAGE = Path(__file__).resolve().parent
_CHECKOUT = _PACKAGE.parents[2] if len(_PACKAGE.parents) > 2 else _PACKAGE
# Installed beside this module; in a source checkout kept with the script that makes it.
DIRECTORY = (
    _PACKAGE if (_PACKAGE / "config.json").is_file() else _CHECKOUT / "benchmarks" / "demo_model"
)
END_OF_FILE = 256
VOCABULARY = 257

# Tests and tables (code pages, the documentation in one string) are not the kind of text that a
# prompt such as ``def `` continues; site-packages is not the standard library; _sysconfigdata
# differs between machines.
_LEFT_OUT_DIRECTORIES = frozenset(
    (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
        "__pycache__",
    )
)
_LEFT_OUT_PREFIX = "_sysconfigdata"
_HELD_OUT_ONE_IN = 16


def is_held_out(name: str) -> bool:
    """Whether the file with this path below the library (``"json/decoder.py"``) is held out."""
    return zlib.crc32(name.encode("utf-8")) % _HELD_OUT_ONE_IN == 0


def library_files(*, held_out: bool, root: Path | None = None) -> list[Path]:
    """The sources of the standard library that are held out, or those trained on, sorted by path.

    Args:
        held_out: which of the two parts.
        root: the directory of the library; this interpreter's by default.

    Raises:
        FileNotFoundError: no source file is below ``root`` (some distributions ship bytecode only).
    """
    base = library_root() if root is None else Path(root)
    names = sorted(path.relative_to(base).as_posix() for path in base.rglob("*.py"))
    kept = [name for name in names if _is_library_text(name)]
    if not kept:
        raise FileNotFoundError(f"root: expected Python sources below {base}, got none")
    return [base / name for name in kept if is_held_out(name) == held_out]


def held_out_files(*, root: Path | None = None) -> list[Path]:
    """Those of the files held out when the model was trained that this machine's library has.

    The list, not the rule, decides: another Python version may keep text that was trained on at a
    path that the rule would hold out.

    Args:
        root: the directory of the library; this interpreter's by default.

    Raises:
        FileNotFoundError: the library has none of them (some distributions ship bytecode only).
    """
    base = library_root() if root is None else Path(root)
    names = json.loads((DIRECTORY / "held_out.json").read_text(encoding="utf-8"))
    found = [base / name for name in names if (base / name).is_file()]
    if not found:
        raise FileNotFoundError(f"root: expected some of {len(names)} sources in {base}, got none")
    return found


def library_root() -> Path:
    """The directory of this interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def token_stream(files: Sequence[Path]) -> np.ndarray:
    """The bytes of the files as token ids, int64 [bytes + files]; ``END_OF_FILE`` ends each."""
    end = np.array([END_OF_FILE], np.int64)
    parts = [end[:0]]
    for file in files:
        parts += [np.frombuffer(file.read_bytes(), np.uint8).astype(np.int64), end]
    return np.concatenate(parts)


def even_windows(stream: np.ndarray, *, count: int, context: int) -> np.ndarray:
    """Windows spread evenly over the stream, int64 [count, context + 1]: inputs and their targets.

    Fewer rows come back when the stream holds fewer windows without overlap.

    Raises:
        ValueError: ``count`` or ``context`` is below 1, or the stream is shorter than one window.
    """
    width = context + 1
    if count < 1 or context < 1:
        raise ValueError(f"count, context: expected at least 1, got {count}, {context}")
    if len(stream) < width:
        raise ValueError(f"stream: expected at least {width} tokens, got {len(stream)}")
    count = min(count, len(stream) // width)
    starts = np.linspace(0, len(stream) - width, count).astype(np.int64)
    return np.stack([stream[start : start + width] for start in starts])


def _is_library_text(name: str) -> bool:
    *directories, file = name.split("/")
    return _LEFT_OUT_DIRECTORIES.isdisjoint(directories) and not file.startswith(_LEFT_OUT_PREFIX)
