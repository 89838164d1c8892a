"""Loading a model: from a directory or the Hugging Face Hub, quantized as stored or on the way."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from . import formats, models, recipes
from .accelerate import accelerate
from .build import Change, build
from .checkpoint import Checkpoint, TensorError, read_config, read_json
from .nn import swap
from .nn.layer import LowbitLayer
from .quantize import quantize_activations as quantize_activations_of

ORIGIN = "_lowbit_origin"
"""Plain attribute of a model, never a parameter: where it came from, for :func:`save`."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ("*.json", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja", "*.md")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Source:
    """A directory, and the hub's id where it was downloaded from there."""

    directory: Path
    repository: str | None = None


@dataclass(frozen=True)
class Origin:
    """What a loaded model keeps to be saved again: its source and its ``config.json``."""

    source: Source
    config: dict[str, Any]


def load(
    path: str | os.PathLike[str],
    quantize_activations: bool = False,
    bits: int | None = None,
    mode: str | None = None,
    group_size: int | None = None,
    lazy: bool = False,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool | None = None,
) -> tuple[nn.Module, Any]:
    """A model whose layers run on this package's kernels, and its tokenizer or processor.

    Checkpoints that are quantized load as they are stored. With `bits`, `mode` or `group_size`, one
    that is not is quantized while it is read, layer by layer: memory holds the quantized model and
    at most two layers more. A local directory never causes any network access.

    Args:
        path: a directory with ``config.json``, safetensors files (with an index or without) and
            tokenizer files; or the id of a repository on the Hugging Face Hub.
        quantize_activations: quantize the input of the layers too, in mxfp8 and nvfp4 only.
        bits, mode, group_size: the format to quantize to; None means the mode's default.
        lazy: leave the parameters unevaluated; they are read when they are first used.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run Python files of the checkpoint (its model, its tokenizer).
        progress: show a bar while quantizing; None means on a terminal.

    Returns:
        The model, and mlx-lm's ``TokenizerWrapper`` or the model's own processor.

    Raises:
        FileNotFoundError: no such directory or repository, or a file that is missing in it.
        ValueError: a malformed file, a tensor that does not fit the configuration, an unknown model
            or format, a model that is quantized already, or `quantize_activations` on a model
            whose mode does not allow it; the message names file, tensor or layer.
    """
    wanted = None
    if (bits, mode, group_size) != (None, None, None):
        wanted = recipes.storage(mode, bits, group_size)
    source = resolve(path, revision)
    model, config = open_model(source, Change(wanted), trust_remote_code=trust_remote_code)
    if quantize_activations:
        _quantize_activations(model, path)
    processor = load_processor(source.directory, config, model, trust_remote_code)
    if not lazy:
        evaluate(model, quantizing=wanted is not None, progress=progress)
    # Merging products would evaluate the layers.
    accelerate(model, merge=False if lazy else None)
    _check_global_scales(model)
    return model, processor


def _quantize_activations(model: nn.Module, path: str | os.PathLike[str]) -> None:
    if not any(swap.holds_quantized_weight(module) for _, module in swap.walk(model)):
        raise ValueError(
            f"{path}: the model is not quantized; activations are quantized in mxfp8 and nvfp4 "
            "models only (mode='mxfp8' or 'nvfp4' quantizes it while loading)"
        )
    try:
        quantize_activations_of(model)
    except ValueError as error:
        # Here no layer is skipped, so its advice would lead nowhere.
        raise ValueError(f"{path}: {str(error).partition('. Pass skip')[0]}") from error


def resolve(
    path: str | os.PathLike[str], revision: str | None = None, *, weights: bool = True
) -> Source:
    """A local directory as it is, or a snapshot from the hub.

    Args:
        weights: download the weight files as well.

    Raises:
        FileNotFoundError: neither a directory nor a repository.
        NotADirectoryError: a file.
    """
    if not str(path):
        raise FileNotFoundError("path: expected a directory or the id of a repository, got ''")
    directory = Path(path).expanduser()
    if directory.is_dir():
        return Source(directory)
    if directory.exists():
        raise NotADirectoryError(f"{path}: expected a directory with a model, got a file")
    if not isinstance(path, str) or not _HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"{path}: no such directory")
    from huggingface_hub import snapshot_download

    patterns = [*_SMALL_FILES, *(["*.safetensors"] if weights else [])]
    try:
        found = snapshot_download(
            path,
            revision=revision,
            allow_patterns=patterns,
            ignore_patterns=["*consolidated*", "original/*"],
        )
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(f"{path}: no such directory, and no download: {reason}") from error
    return Source(Path(found), path)


def open_model(
    source: Source, change: Change, *, trust_remote_code: bool = False
) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a checkpoint with its parameters unevaluated, and its ``config.json``.

    Raises:
        FileNotFoundError, ValueError: as :func:`load`.
    """
    config = read_config(source.directory)
    module = _module(source.directory, config, trust_remote_code)
    checkpoint = Checkpoint.open(source.directory)
    if (method := recipes.foreign_method(config)) is not None:
        model = _of_mlx_lm(source.directory, module, method, change)
    else:
        try:
            model = build(module, config, change, checkpoint.load())
        except TensorError as error:
            raise ValueError(f"{checkpoint.place(error.tensor)}: {error.reason}") from error
    setattr(model, ORIGIN, Origin(source, config))
    return model, config


def _module(directory: Path, config: dict[str, Any], trust_remote_code: bool) -> Any:
    file = config.get("model_file")
    if file is None:
        return models.module_for(config)
    if not trust_remote_code:
        raise ValueError(
            f"{directory}: the model is defined in its file {file!r}, which is only run with "
            "trust_remote_code=True"
        )
    path = directory / Path(str(file)).name
    spec = importlib.util.spec_from_file_location("mlx_lowbit_custom_model", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; config.json names it as model_file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _of_mlx_lm(directory: Path, module: Any, method: str, change: Change) -> nn.Module:
    """A checkpoint that another tool quantized, as far as mlx-lm can read it."""
    if change.storage is not None or change.dequantize or change.dtype is not None:
        raise ValueError(f"{directory}: quantized by {method}; it can be loaded as it is only")
    from mlx_lm.utils import load_model

    try:
        model, _ = load_model(
            directory,
            lazy=True,
            get_model_classes=lambda config: (module.Model, module.ModelArgs),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{directory}: quantized by {method}: {error}") from error
    return model


def evaluate(model: nn.Module, *, quantizing: bool, progress: bool | None = None) -> None:
    """Evaluates the parameters: all at once, or layer by layer while they are quantized.

    Raises:
        ValueError: a weight to be quantized holds a NaN or an infinity; its tensor is named.
    """
    if quantizing:
        from tqdm import tqdm

        layers = [(path, m) for path, m in swap.walk(model) if swap.holds_quantized_weight(m)]
        hidden = None if progress is None else not progress
        for path, layer in tqdm(layers, desc="Quantizing", unit="layer", disable=hidden):
            mx.eval([value for value in layer.values() if isinstance(value, mx.array)])
            check_finite(path, layer["scales"], layer.mode)
            mx.clear_cache()
    mx.eval(model.parameters())


def check_finite(path: str, scales: mx.array, mode: str) -> None:
    """Refuses a weight that was not finite when it was quantized.

    Raises:
        ValueError: naming the tensor and its first row that is not.
    """
    mark = next(f.nan_scale for f in formats.FORMATS if f.mode == mode)
    wrong = mx.isnan(scales) if mark is None else scales == mark
    rows = wrong.any(axis=-1)
    if rows.any().item():
        row = mx.argmax(rows.flatten()).item()
        raise ValueError(f"tensor '{path}.weight': a NaN or an infinity in row {row}")


def _check_global_scales(model: nn.Module) -> None:
    for path, layer in swap.walk(model):
        scaled = isinstance(layer, nn.Module) and layer.get("global_scale") is not None
        if scaled and not isinstance(layer, LowbitLayer) and "Switch" not in type(layer).__name__:
            raise ValueError(f"{path}: its global_scale needs this package's kernels")


def load_processor(
    directory: Path, config: dict[str, Any], model: nn.Module, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a directory, in mlx-lm's wrapper, or the processor of the model.

    Raises:
        FileNotFoundError: no tokenizer is there.
        ValueError: one that cannot be read, or that has more tokens than the model.
    """
    module = models.module_for(config) if config.get("model_file") is None else None
    if (own := getattr(module, "load_processor", None)) is not None:
        return own(directory, config)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{directory}: no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    ends = end_tokens(directory, config)
    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    defaults = getattr(module, "TOKENIZER_DEFAULTS", None)
    more = {} if defaults is None else {"defaults": defaults}
    try:
        tokenizer = load_tokenizer(directory, options, eos_token_ids=ends, **more)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{directory}: the tokenizer cannot be read: {reason}") from error
    rows = getattr(getattr(model, "args", None), "vocab_size", None)
    size = getattr(tokenizer, "vocab_size", None)
    if isinstance(rows, int) and isinstance(size, int) and size > rows:
        raise ValueError(
            f"{directory}: the tokenizer has {size} tokens, the model {rows}: that of another model?"
        )
    return tokenizer


def end_tokens(directory: Path, config: Mapping[str, Any]) -> list[int] | None:
    """The ids that end a text: ``generation_config.json``'s, else the configuration's, if any.

    Raises:
        ValueError: what is no id or list of ids, naming the file.
    """
    file = directory / "generation_config.json"
    parts = [(file, read_json(file))] if file.is_file() else []
    parts += [
        (directory / "config.json", part)
        for part in (config, config.get("thinker_config"), config.get("text_config"))
    ]
    for where, part in parts:
        found = part.get("eos_token_id") if isinstance(part, Mapping) else None
        if found is None:
            continue
        ids = found if isinstance(found, list) else [found]
        if any(isinstance(each, bool) or not isinstance(each, int) for each in ids):
            raise ValueError(f"{where}: eos_token_id: expected an id or a list, got {found!r}")
        return ids
    return None
