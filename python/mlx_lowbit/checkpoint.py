"""Checkpoint directories: reading ``config.json`` and weight files, and writing them.

A weight file is validated by the safetensors library before MLX reads it. ``mx.load`` itself
accepts overlapping tensors, shapes that do not fit their bytes, and offsets outside of the file.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30

# What mx.load makes of each dtype; 8-bit floats come as their bytes.
_DTYPES = {
    "BOOL": mx.bool_,
    "U8": mx.uint8,
    "I8": mx.int8,
    "U16": mx.uint16,
    "I16": mx.int16,
    "U32": mx.uint32,
    "I32": mx.int32,
    "U64": mx.uint64,
    "I64": mx.int64,
    "F16": mx.float16,
    "BF16": mx.bfloat16,
    "F32": mx.float32,
    "F8_E4M3": mx.uint8,
    "F8_E8M0": mx.uint8,
}
_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}
_LARGEST = 2**31 - 1  # a dimension of an mx.array


class TensorError(ValueError):
    """A tensor that does not fit; ``tensor`` is its name in the files."""

    def __init__(self, tensor: str, reason: str) -> None:
        super().__init__(f"{tensor}: {reason}")
        self.tensor, self.reason = tensor, reason


@dataclass(frozen=True)
class Tensor:
    """What a file's header says of one tensor."""

    file: Path
    dtype: mx.Dtype
    shape: tuple[int, ...]


@dataclass
class Checkpoint:
    """The validated weight files of a directory.

    Attributes:
        files: in the order in which they are read.
        tensors: every tensor by name.
    """

    directory: Path
    files: list[Path] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Validates the weight files that the index names, or all ``model*.safetensors``.

        Raises:
            FileNotFoundError: no weights, or a shard that the index names is missing.
            ValueError: an index or a file that is malformed, naming it and, where there is one,
                the tensor; a tensor in two files, or one of a dtype that MLX does not have.
        """
        files, promised = weight_files(directory)
        self = cls(directory, files)
        for file in files:
            for name, tensor in read_header(file).items():
                if name in self.tensors:
                    other = self.tensors[name].file
                    raise ValueError(f"{file}: tensor {name!r} is in {other.name} as well")
                self.tensors[name] = tensor
        for name, file in promised.items():
            tensor = self.tensors.get(name)
            if tensor is None or tensor.file.name != file.name:
                raise ValueError(f"{file}: tensor {name!r}, which the index names, is not there")
        return self

    def load(self) -> dict[str, mx.array]:
        """Every tensor, lazily: the bytes are read when an array is evaluated.

        Raises:
            ValueError: a file that changed since it was validated.
        """
        weights: dict[str, mx.array] = {}
        for file in self.files:
            try:
                part = mx.load(str(file))
            except Exception as error:
                raise ValueError(f"{file}: {error}") from error
            for name, value in part.items():
                known = self.tensors.get(name)
                if known is None or tuple(value.shape) != known.shape:
                    raise ValueError(f"{file}: tensor {name!r} changed while it was read")
            weights.update(part)
        return weights

    def place(self, name: str) -> str:
        """The file and name of a tensor for a message, or the directory where no file has it.

        `name` may be the model's, without the prefix that the files give it.
        """
        found = [name] if name in self.tensors else []
        found = found or [each for each in self.tensors if each.endswith(f".{name}")]
        where = self.tensors[found[0]].file if len(found) == 1 else self.directory
        return f"{where}: tensor {(found[0] if len(found) == 1 else name)!r}"


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON, or no object, naming the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are
        raise ValueError(f"{path}: no JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json``, with the tagged floats of transformers as floats.

    Where it does not speak of quantization, the bits and group size of a ``quantize_config.json``
    beside it (OminiX's) become its ``quantization``; that of another tool stays where it is.

    Raises:
        FileNotFoundError, ValueError: as :func:`read_json`.
    """
    config = _floats(read_json(directory / "config.json"))
    beside = directory / "quantize_config.json"
    if beside.exists() and not {"quantization", "quantization_config"} & config.keys():
        block = read_json(beside)
        block = block.get("quantization", block)
        if isinstance(block, dict) and set(block) <= {"bits", "group_size", "mode"}:
            config["quantization"] = block
    return config


def _floats(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"__float__"} and value["__float__"] in _FLOATS:
            return _FLOATS[value["__float__"]]
        return {key: _floats(each) for key, each in value.items()}
    return [_floats(each) for each in value] if isinstance(value, list) else value


def _tagged(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {"__float__": name}
    if isinstance(value, dict):
        return {key: _tagged(each) for key, each in value.items()}
    return [_tagged(each) for each in value] if isinstance(value, (list, tuple)) else value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes `value` as mlx-lm does its configurations: sorted keys, four spaces."""
    text = json.dumps(_tagged(dict(sorted(value.items()))), indent=4)
    path.write_text(text + "\n", encoding="utf-8")


# --- which files -------------------------------------------------------------------------------


def weight_files(directory: Path) -> tuple[list[Path], dict[str, Path]]:
    """The files with the weights, and the file of every tensor that the index names.

    Raises:
        FileNotFoundError, ValueError: as :meth:`Checkpoint.open`.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected weight_map, an object that is not empty")
        promised = {name: _shard(index, name, file) for name, file in weight_map.items()}
        return sorted(set(promised.values())), promised
    files = sorted(directory.glob("model*.safetensors"))
    files = files or sorted(
        file for file in directory.glob("*.safetensors") if "consolidated" not in file.name
    )
    if not files:
        other = [p.name for e in ("bin", "pt", "pth", "gguf") for p in directory.glob(f"**/*.{e}")]
        found = f"; {other[0]} is no safetensors file" if other else ""
        raise FileNotFoundError(f"{directory}: no weights (model*.safetensors){found}")
    return files, {}


def _shard(index: Path, name: str, file: Any) -> Path:
    relative = PurePosixPath(file) if isinstance(file, str) else None
    if relative is None or relative.is_absolute() or ".." in relative.parts or "\\" in file:
        raise ValueError(f"{index}: tensor {name!r}: expected a file of this directory: {file!r}")
    if relative.suffix != ".safetensors":
        raise ValueError(f"{index}: tensor {name!r}: expected a .safetensors file, got {file!r}")
    path = index.parent / relative
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {index.name} names it for tensor {name!r}")
    return path


# --- one file ----------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, Tensor]:
    """Dtype and shape of every tensor in a safetensors file, which the library has validated.

    Raises:
        ValueError: a malformed file, or a tensor that MLX cannot hold, naming both.
    """
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            headers = {name: (s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (safetensors.SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path}: {_fault(path) or error}") from error
    # The library lets a name pass that is there twice, and dtypes that MLX does not have.
    if (fault := _fault(path)) is not None:
        raise ValueError(f"{path}: {fault}")
    tensors = {}
    for name, (dtype, shape) in headers.items():
        if any(size > _LARGEST for size in shape):
            raise ValueError(f"{path}: tensor {name!r}: shape {list(shape)} is too large")
        tensors[name] = Tensor(path, _DTYPES[dtype], shape)
    return tensors


def _fault(path: Path) -> str | None:
    """What is wrong with a file, with the tensor where it is one's fault, or None."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start.startswith(b"version "):
            return "a Git LFS pointer instead of the file itself; fetch it with git lfs pull"
        if size < 8 or length > size - 8:
            return f"{size} bytes end within the header: truncated, or no safetensors file"
        text = file.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        return f"the header is no JSON: {error}"
    if not isinstance(header, dict):
        return "the header is no JSON object"
    header.pop("__metadata__", None)
    data, spans = size - 8 - length, []
    for name, entry in header.items():
        if (fault := _entry_fault(entry, data)) is not None:
            return f"tensor {name!r}: {fault}"
        spans.append((*entry["data_offsets"], name))
    end, before = 0, None
    for begin, stop, name in sorted(spans):
        if begin != end:
            what = "overlaps" if begin < end else "leaves a gap after"
            return f"tensor {name!r}: {what} {'the header' if before is None else repr(before)}"
        end, before = stop, name
    return f"{data - end} bytes after the last tensor {before!r}" if end < data else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is in it twice")
    return keys


def _entry_fault(entry: Any, data: int) -> str | None:
    def whole(values: Any, count: int | None = None) -> bool:
        return (
            isinstance(values, list)
            and (count is None or len(values) == count)
            and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
        )

    if not isinstance(entry, dict):
        return f"expected an object, got {entry!r}"
    if (dtype := entry.get("dtype")) not in _DTYPES:
        return f"dtype {dtype!r} is not supported"
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not whole(shape):
        return f"shape: expected whole numbers, got {shape!r}"
    if not whole(offsets, 2) or offsets[0] > offsets[1]:
        return f"data_offsets: expected two ascending whole numbers, got {offsets!r}"
    if offsets[1] > data:
        return f"its bytes end at {offsets[1]}, the data at {data}: an incomplete download?"
    needed = math.prod(shape) * _DTYPES[dtype].size
    if needed != offsets[1] - offsets[0]:
        return f"{dtype} {shape} needs {needed} bytes, it has {offsets[1] - offsets[0]}"
    return None


# --- writing -----------------------------------------------------------------------------------


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, in shards of at most `limit` bytes or one tensor."""
    shards: list[list[str]] = []
    filled = limit
    for name, size in sizes.items():
        if not shards or filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def write_shards(
    directory: Path,
    weights: dict[str, mx.array],
    *,
    parameters: int,
    check: Any = None,
) -> None:
    """Writes ``model*.safetensors`` and their index, as mlx-lm does.

    `weights` is emptied on the way: lazy arrays are evaluated one by one, and a shard's are
    released when it is written, so that no more than one shard is held.

    Args:
        parameters: what the index states as ``total_parameters``.
        check: called with name and array of each tensor before it is written.

    Raises:
        OSError: not enough space.
    """
    sizes = {name: value.nbytes for name, value in weights.items()}
    total, free = sum(sizes.values()), shutil.disk_usage(directory).free
    if total > free:
        raise OSError(f"{directory}: {total / 1e9:.2f} GB to write, {free / 1e9:.2f} GB are free")
    shards = plan_shards(sizes, SHARD_BYTES)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors"
        if len(shards) > 1:
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard: dict[str, mx.array] = {}
        for name in names:
            shard[name] = weights.pop(name)
            mx.eval(shard[name])
            if check is not None:
                check(name, shard[name])
        mx.save_safetensors(str(directory / file), shard, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(names, file))
    index = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / INDEX).write_text(json.dumps(index, indent=4), encoding="utf-8")
