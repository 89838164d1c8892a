"""Saving a model so that this package, mlx-lm, mlx-vlm and mlx-audio load it bit for bit."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from . import checkpoint, models, recipes
from .load import ORIGIN, Origin
from .nn import swap

# What belongs to a model besides its weights and its configuration.
_BESIDE = ("*.json", "*.jsonl", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
_BESIDE_FOLDERS = ("additional_chat_templates",)
_WRITTEN = ("config.json", "hf_quant_config.json", "quantize_config.json")
_TASKS = {
    "image-text-to-text": ("prismatic", "moxin_vlm"),
    "automatic-speech-recognition": ("qwen3_asr",),
}


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    processor: Any = None,
    *,
    config: dict[str, Any] | None = None,
) -> Path:
    """Writes a model with everything that loading it again needs.

    Sharded safetensors with an index, ``config.json`` with the quantization as the layers have it
    (under both names that tools read), the tokenizer's and processor's files, and a model card.
    They are written beside `path`, which appears when they are complete.

    Args:
        model: one that :func:`mlx_lowbit.load` returned; any other with `config`.
        path: a directory that does not exist yet, or is empty.
        processor: a tokenizer or processor to save instead of copying the files that the model was
            loaded with.
        config: the ``config.json`` to write; by default the one the model was loaded with.

    Returns:
        The directory.

    Raises:
        TypeError: `model` is no ``mlx.nn.Module``.
        ValueError: no configuration is known, or `path` is within the directory that the model was
            loaded from.
        FileExistsError: `path` is there already.
        OSError: a path that cannot be written, or not enough space.
    """
    swap.check_model(model)
    origin: Origin | None = getattr(model, ORIGIN, None)
    if config is None and origin is None:
        raise ValueError("config: expected the model's config.json, since load() did not make it")
    target = Path(path).expanduser()
    check_target(target, None if origin is None else origin.source.directory)
    with new_directory(target) as directory:
        write(model, directory, config or origin.config, origin, processor, name=target.name)
    return target


def check_target(path: Path, source: Path | None = None) -> None:
    """Refuses a directory to write that is there already, unless it is empty, or cannot be made.

    Args:
        source: a directory that is read; nothing is written into it.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError, ValueError: naming `path`.
    """
    if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(f"{path}: already exists; delete it or choose another path")
    parent = next(each for each in path.absolute().parents if each.exists())
    if not parent.is_dir():
        raise NotADirectoryError(f"{path}: cannot be made, since {parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path}: cannot be made, since {parent} cannot be written")
    if source is not None and source.resolve() in path.resolve().parents:
        raise ValueError(f"{path}: expected a directory outside of {source}, which is read")


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path`, which gets that name if the block succeeds.

    Raises:
        FileExistsError, NotADirectoryError, PermissionError: as :func:`check_target`.
    """
    check_target(path)
    made = [each for each in path.absolute().parents if not each.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        temporary.mkdir()
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        for each in made:
            with suppress(OSError):  # no longer empty
                each.rmdir()
        raise


def write(
    model: nn.Module,
    directory: Path,
    config: dict[str, Any],
    origin: Origin | None,
    processor: Any = None,
    *,
    name: str,
    donate: bool = False,
    check: Callable[[str, mx.array], None] | None = None,
) -> None:
    """The files of :func:`save` into an existing directory.

    Args:
        name: what the card calls the model.
        donate: take the parameters out of `model` on the way, so that one shard is held at a time.
        check: called with name and array of each tensor before it is written.
    """
    block, parameters = recipes.write_block(model), count(model)
    size = sum(value.nbytes for _, value in tree_flatten(model.parameters()))
    weights = dict(tree_flatten(model.parameters()))
    if donate:
        model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    checkpoint.write_shards(directory, weights, parameters=parameters, check=check)
    written = saved_config(complete(config), block)
    checkpoint.write_json(directory / "config.json", written)
    if origin is not None:
        _copy_beside(origin.source.directory, directory)
    if processor is not None:
        processor.save_pretrained(str(directory))
    text = card(name, written, origin, bits=8 * size / max(parameters, 1))
    (directory / "README.md").write_text(text, encoding="utf-8")


def count(model: nn.Module) -> int:
    """The number of weights, of quantized layers as many as they stand for, without their scales."""
    total = 0
    for _, module in swap.walk(model):
        own = {k: v for k, v in module.parameters().items() if isinstance(v, mx.array)}
        if swap.holds_quantized_weight(module):
            total += own["weight"].size * 32 // recipes.of_layer(module).bits
            own = {"bias": own["bias"]} if "bias" in own else {}
        total += sum(value.size for value in own.values())
    return total


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with every setting that mlx-lm's model of the same type cannot do without.

    Our definitions take what is missing from ``rope_parameters`` or from transformers' defaults.
    """
    from mlx_lm.utils import _get_classes

    try:
        own, theirs = models.get_classes(config)[1], _get_classes(config)[1]
        if own is theirs or not is_dataclass(theirs):
            return config
        args = own.from_dict(config)
    except (ValueError, KeyError, TypeError):  # a model that only we have, or none
        return config
    needed = [f.name for f in fields(theirs) if f.default is f.default_factory is MISSING]
    return {n: getattr(args, n) for n in needed if n not in config and hasattr(args, n)} | config


def saved_config(config: dict[str, Any], block: dict[str, Any] | None) -> dict[str, Any]:
    """`config` with this block under both names, and with no other statement of quantization."""
    new = {key: value for key, value in config.items() if key != "_name_or_path"}
    for part in ("text_config", "thinker_config"):
        if isinstance(new.get(part), dict):
            new[part] = _without_block(new[part])
    new = _without_block(new)
    if block is not None:
        new["quantization"] = new["quantization_config"] = block
    return new


def _without_block(config: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in ("quantization", "quantization_config")}


def _copy_beside(source: Path, directory: Path) -> None:
    for pattern in _BESIDE:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file.name not in _WRITTEN and ".safetensors." not in file.name:
                shutil.copyfile(file, directory / file.name)
    for folder in _BESIDE_FOLDERS:
        if (source / folder).is_dir():
            shutil.copytree(source / folder, directory / folder)


def card(name: str, config: dict[str, Any], origin: Origin | None, *, bits: float) -> str:
    """The model card (README.md): what the model was made of, how it is stored, how it is used."""
    from huggingface_hub import ModelCardData

    from . import __version__

    known = _card_data(origin)
    base = origin.source.repository if origin is not None else None
    tags = [tag for tag in known.get("tags") or [] if isinstance(tag, str)]
    kept = {key: known[key] for key in ("license", "license_link", "language") if known.get(key)}
    data = ModelCardData(
        **kept,
        library_name="mlx",
        pipeline_tag=task(config),
        tags=[*tags, *(tag for tag in ("mlx",) if tag not in tags)],
        base_model=base or known.get("base_model"),
    )
    block = config.get("quantization")
    stored = "not quantized" if block is None else str(recipes.read_block(config).default)
    if block is not None and any(isinstance(value, dict) for value in block.values()):
        stored += ", some layers otherwise (config.json)"
    made = f" from [{base}](https://huggingface.co/{base})" if base else ""
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {name}\n\n"
        f"Converted{made} by mlx-lowbit {__version__}. Weights: {stored}; {bits:.3f} bits per "
        "weight.\n\n```python\nimport mlx_lowbit\n\n"
        f'model, processor = mlx_lowbit.load("{name}")\n```\n'
    )


def task(config: dict[str, Any]) -> str:
    """The hub's name for what a model does."""
    try:
        kind = models.model_type(config)
    except ValueError:
        kind = None
    return next((name for name, kinds in _TASKS.items() if kind in kinds), "text-generation")


def _card_data(origin: Origin | None) -> dict[str, Any]:
    """What the card of the source says above its text; nothing if it has none or a broken one."""
    file = None if origin is None else origin.source.directory / "README.md"
    if file is None or not file.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        return metadata_load(file) or {}
    except Exception:  # whatever YAML makes of it; a card is no reason to fail
        return {}
