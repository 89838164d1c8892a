"""``mlx_lowbit.convert``: checkpoints of Hugging Face into MLX's, quantized, cast or decoded."""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from . import cli, models, recipes
from .build import Change, build, float_dtype
from .checkpoint import read_config
from .load import ORIGIN, Source, check_finite, load_processor, open_model, resolve
from .nn import swap
from .recipes import Predicate
from .save import check_target, count, new_directory, write

NAME = "mlx_lowbit.convert"
DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Row:
    """A line of the table: a part of the model in one storage."""

    part: str
    stored: str
    tensors: int
    weights: int
    bytes: int


@dataclass(frozen=True)
class Sizes:
    """What a model takes; ``print(sizes)`` shows it as a table.

    Attributes:
        rows: by part and storage.
        parameters: weights, as many as quantized layers stand for.
        bytes: of all tensors, scales included.
    """

    rows: tuple[Row, ...]
    parameters: int
    bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.bytes / max(self.parameters, 1)

    def __str__(self) -> str:
        large = self.bytes >= 1e8
        unit, scale, power = ("GB", 1e9, 2**30) if large else ("MB", 1e6, 2**20)
        lines = [("part", "stored as", "tensors", "weights", unit)]
        tensors = sum(row.tensors for row in self.rows)
        lines += [
            (part, stored, str(count), f"{weights:,}", f"{size / scale:.3f}")
            for part, stored, count, weights, size in (
                *((r.part, r.stored, r.tensors, r.weights, r.bytes) for r in self.rows),
                ("all", "", tensors, self.parameters, self.bytes),
            )
        ]
        wide = [max(len(line[column]) for line in lines) for column in range(5)]
        table = [
            f"{a:<{wide[0]}}  {b:<{wide[1]}}  {c:>{wide[2]}}  {d:>{wide[3]}}  {e:>{wide[4]}}"
            for a, b, c, d, e in lines
        ]
        size = f"{self.bytes / scale:.2f} {unit} ({self.bytes / power:.2f} {unit[0]}iB)"
        return "\n".join([*table, size])


def sizes(model: nn.Module) -> Sizes:
    """What the parameters of `model` take, by shapes and dtypes alone: nothing is evaluated."""
    grouped: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0])
    for path, module in swap.walk(model):
        part = path.split(".")[0] or "model"
        for name, value in module.parameters().items():
            if not isinstance(value, mx.array):
                continue
            stored, weights = str(value.dtype).removeprefix("mlx.core."), value.size
            if swap.holds_quantized_weight(module) and name != "bias":
                storage = recipes.of_layer(module)
                stored = str(storage)
                weights = value.size * 32 // storage.bits if name == "weight" else 0
            entry = grouped[part, stored]
            for i, amount in enumerate((1, weights, value.nbytes)):
                entry[i] += amount
    rows = tuple(Row(*key, *entry) for key, entry in grouped.items())
    return Sizes(rows, count(model), sum(row.bytes for row in rows))


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    quant_predicate: str | Predicate | None = None,
    trust_remote_code: bool = False,
    *,
    vision: bool = False,
    audio: bool = False,
    dry_run: bool = False,
) -> Sizes:
    """Writes a checkpoint as an MLX model, with the arguments of ``mlx_lm.convert``.

    Memory holds one shard of what is written (5 GiB) and the source of one tensor.

    Args:
        hf_path: a directory, or the id of a repository on the hub.
        mlx_path: the directory to write; it may not exist.
        quantize: to `q_bits`, `q_group_size` and `q_mode`; None means the mode's default.
        dtype: of what is not quantized; by default what the configuration states.
        quant_predicate: one of :data:`mlx_lowbit.recipes.RECIPES`, or a function (path, module) ->
            bool or dict.
        vision, audio: quantize the layers that read images or sound too.
        dry_run: write nothing and compute no weight; without weight files the sizes follow from
            ``config.json`` alone.

    Returns:
        What the converted model takes, also printed.

    Raises:
        FileExistsError: `mlx_path` is there already.
        FileNotFoundError, ValueError: as :func:`mlx_lowbit.load`; or options that exclude each
            other.
    """
    change = _change(
        quantize, q_group_size, q_bits, q_mode, dtype, dequantize, quant_predicate, vision, audio
    )
    target = Path(mlx_path).expanduser()
    if not dry_run:
        local = Path(hf_path).expanduser()
        check_target(target, local if local.is_dir() else None)
    print("[INFO] Loading")
    source = resolve(hf_path, revision, weights=not dry_run)
    config = read_config(source.directory)
    change = _with_dtype(change, config, given=dtype is not None)
    if change.dtype is not None:
        print("[INFO] Using dtype:", str(change.dtype).removeprefix("mlx.core."))
    if dry_run and not any(source.directory.glob("*.safetensors")):
        model = _blank(config, change)
    else:
        model, config = open_model(source, change, trust_remote_code=trust_remote_code)
    table = sizes(model)
    if quantize:
        print("[INFO] Quantizing")
    if dequantize:
        print("[INFO] Dequantizing")
    if not dry_run:
        _write(model, config, target, source, quantizing=quantize, trust=trust_remote_code)
    print(table)
    kind = "Quantized model" if quantize else "Model"
    print(f"[INFO] {kind} with {table.bits_per_weight:.3f} bits per weight.")
    if upload_repo is not None and not dry_run:
        upload(target, upload_repo)
    return table


def _change(
    quantize: bool,
    group_size: int | None,
    bits: int | None,
    mode: str,
    dtype: str | None,
    dequantize: bool,
    recipe: str | Predicate | None,
    vision: bool,
    audio: bool,
) -> Change:
    if quantize and dequantize:
        raise ValueError("quantize and dequantize exclude each other")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    chosen = (recipe, bits, group_size) != (None, None, None) or mode != "affine"
    if not quantize and (chosen or vision or audio):
        raise ValueError(
            "quant_predicate, vision, audio, q_bits, q_group_size and q_mode need quantize (-q)"
        )
    if isinstance(recipe, str) and bits is not None:
        raise ValueError(f"q_bits: expected none with quant_predicate {recipe!r}, got {bits}")
    if isinstance(recipe, str) and mode != "affine":
        raise ValueError(f"quant_predicate {recipe!r} needs q_mode 'affine', got {mode!r}")
    storage = recipes.storage(mode, bits, group_size) if quantize else None
    return Change(storage, recipe, vision, audio, getattr(mx, dtype) if dtype else None, dequantize)


def _with_dtype(change: Change, config: dict, *, given: bool) -> Change:
    """The dtype that the configuration states, where none is asked for.

    What is quantized already keeps its own, since casting scales would change every weight.
    """
    quantized = recipes.read_block(config) is not None or recipes.foreign_method(config) is not None
    if given or quantized:
        return change
    return Change(**{**vars(change), "dtype": float_dtype(config)})


def _blank(config: dict, change: Change) -> nn.Module:
    """The model of a configuration without any weight file."""
    if change.dequantize:
        change = Change(dtype=change.dtype)
    elif (block := recipes.read_block(config)) is not None:
        raise ValueError(f"weights: there are none, and the model is quantized ({block.default})")
    if change.dtype is None:
        change = Change(**{**vars(change), "dtype": float_dtype(config) or mx.bfloat16})
    return build(models.module_for(config), config, change)


def _write(
    model: nn.Module, config: dict, target: Path, source: Source, *, quantizing: bool, trust: bool
) -> None:
    from tqdm import tqdm

    # A tokenizer that cannot be read is told before hours of work, not after.
    load_processor(source.directory, config, model, trust)
    modes = {
        f"{path}.scales": layer.mode
        for path, layer in swap.walk(model)
        if swap.holds_quantized_weight(layer)
    }
    tensors = sum(row.tensors for row in sizes(model).rows)
    with (
        new_directory(target) as directory,
        tqdm(desc="Writing", unit="tensor", disable=None, total=tensors) as bar,
    ):

        def check(name: str, value: mx.array) -> None:
            if quantizing and name in modes:
                check_finite(name.removesuffix(".scales"), value, modes[name])
            mx.clear_cache()
            bar.update()

        origin = getattr(model, ORIGIN)
        write(model, directory, config, origin, name=target.name, donate=True, check=check)


def upload(path: Path, repository: str) -> None:
    """Uploads a converted model to the hub, creating the repository."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo_id=repository, exist_ok=True)
    api.upload_large_folder(folder_path=str(path), repo_id=repository, repo_type="model")
    print(f"[INFO] https://huggingface.co/{repository}")


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line, with mlx-lm's names."""
    parser = argparse.ArgumentParser(
        prog=NAME, description="Converts a checkpoint to an MLX model, quantizing it on the way."
    )
    parser.add_argument(
        "--hf-path", "--model", required=True, help="a local directory or a Hugging Face id"
    )
    parser.add_argument("--mlx-path", default="mlx_model", help="directory to write")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize the weights")
    parser.add_argument("--q-group-size", type=int, help="weights that share a scale")
    parser.add_argument("--q-bits", type=int, help="bits per weight")
    parser.add_argument("--q-mode", default="affine", help="affine, mxfp4, mxfp8 or nvfp4")
    parser.add_argument(
        "--quant-predicate",
        choices=recipes.RECIPES,
        help="a mixed recipe: mlx-lm's, or with mlx_vlm. before it mlx-vlm's",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of what is not quantized; default: the configuration's"
    )
    parser.add_argument("--upload-repo", help="upload to this repository afterwards")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("-d", "--dequantize", action="store_true", help="store weights in floats")
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--vision", action="store_true", help="quantize what reads images, too")
    parser.add_argument("--audio", action="store_true", help="quantize what reads sound, too")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the sizes; compute and write nothing"
    )
    return parser


def _command(options: argparse.Namespace) -> int:
    convert(**vars(options))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit status."""
    return cli.run(NAME, _command, setup_arg_parser(), argv)


if __name__ == "__main__":
    raise SystemExit(main())
