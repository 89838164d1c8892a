"""Which layer of a model is stored in which format: configuration blocks, requests, mixed recipes.

mlx-lm and mlx-vlm have recipes of the same names that choose different layers. Here the plain names
are mlx-lm's, and ``mlx_vlm.mixed_3_6`` is mlx-vlm's.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from . import formats
from .checkpoint import TensorError
from .nn import swap

_KEYS = ("group_size", "bits", "mode")
# Parts of paths of everything that reads images or sound. Never quantized unless asked for.
VISION = (
    "vision_model",
    "vision_tower",
    "vision_backbone",
    "vl_connector",
    "sam_model",
    "img_projector",
    "multi_modal_projector",
    "patch_merge_mlp",
    "projector",
)
AUDIO = ("audio_model", "audio_tower", "audio_encoder", "code_predictor")

# (bits of most layers, bits of those that matter more)
_MLX_LM = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
_MLX_VLM = _MLX_LM | {"mixed_3_5": (3, 5), "mixed_3_8": (3, 8), "mixed_4_8": (4, 8)}
_VLM = "mlx_vlm."
_VLM_GROUP_SIZE = 64
RECIPES = (*_MLX_LM, *sorted(_VLM + name for name in _MLX_VLM))

Predicate = Callable[[str, nn.Module], "bool | dict[str, Any]"]


class Storage(NamedTuple):
    """How a weight is stored, in the words of ``mx.quantize``."""

    mode: str
    bits: int
    group_size: int

    def __str__(self) -> str:
        if self.mode == "affine":
            return f"affine {self.bits}-bit, groups of {self.group_size}"
        return self.mode

    def keywords(self) -> dict[str, Any]:
        """What ``to_quantized`` and configuration blocks take."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}


def storage(mode: Any = None, bits: Any = None, group_size: Any = None) -> Storage:
    """A format by its three names, with the mode's defaults for what is None.

    Raises:
        ValueError: no such format; the message names the argument and what would do.
    """
    mode = "affine" if mode is None else mode
    if not isinstance(mode, str):
        raise ValueError(f"mode must be a string, got {mode!r}")
    for name, value in (("bits", bits), ("group_size", group_size)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
    try:
        found = formats.get(mode, bits, group_size)
    except formats.MissingFormatError:  # MLX's own layers run it
        found = formats.get(mode, None, group_size)
        return Storage(mode, bits, found.group_size)
    return Storage(found.mode, found.bits, found.group_size)


# --- configuration blocks ----------------------------------------------------------------------


@dataclass
class Block:
    """The ``quantization`` of a configuration.

    Attributes:
        default: for every layer with scales that ``paths`` does not name.
        paths: layers of another format, or False for one that is not quantized.
    """

    default: Storage
    paths: dict[str, Storage | bool] = field(default_factory=dict)


def read_block(config: Mapping[str, Any]) -> Block | None:
    """The validated block of a configuration, or None for a model that is not quantized.

    A ``quantization_config`` of another tool (one with a ``quant_method``) is none: see
    :func:`foreign_method`.

    Raises:
        ValueError: no object, a format that does not exist, or a layer that is neither an object
            nor a boolean, naming the key.
    """
    block = _find(config, "quantization")
    if block is None and foreign_method(config) is None:
        block = _find(config, "quantization_config")
    if block is None:
        return None
    if not isinstance(block, dict):
        raise ValueError(f"quantization: expected an object, got {block!r}")
    default = _entry("quantization", block)
    paths: dict[str, Storage | bool] = {}
    for key, value in block.items():
        if isinstance(value, dict):
            paths[key] = _entry(f"quantization: {key}", value)
        elif isinstance(value, bool):
            paths[key] = default if value else False
        elif key not in _KEYS and "." in key:
            raise ValueError(f"quantization: {key}: expected an object or false, got {value!r}")
    return Block(default, paths)


def foreign_method(config: Mapping[str, Any]) -> str | None:
    """The ``quant_method`` of another tool's quantization, or None."""
    if _find(config, "quantization") is not None:
        return None
    block = _find(config, "quantization_config")
    return block.get("quant_method") if isinstance(block, dict) else None


def _find(config: Mapping[str, Any], key: str) -> Any:
    parts = (config, config.get("text_config"), config.get("thinker_config"))
    for part in parts:
        if isinstance(part, Mapping) and part.get(key) is not None:
            return part[key]
    return None


def _entry(where: str, value: Mapping[str, Any]) -> Storage:
    try:
        return storage(value.get("mode"), value.get("bits"), value.get("group_size"))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def write_block(model: nn.Module) -> dict[str, Any] | None:
    """The block that says how the layers of `model` are stored, or None if none is quantized.

    The format of most layers is the default, all others are named.
    """
    stored = {path: layer for path, layer in swap.walk(model) if swap.holds_quantized_weight(layer)}
    if not stored:
        return None
    own = {path: of_layer(layer) for path, layer in stored.items()}
    default = Counter(own.values()).most_common(1)[0][0]
    block = default.keywords()
    for path, each in own.items():
        scaled = stored[path].get("global_scale") is not None
        if each != default or scaled:
            block[path] = each.keywords() | ({"global_scale": True} if scaled else {})
    return block


def of_layer(layer: nn.Module) -> Storage:
    """How a quantized layer is stored."""
    return storage(layer.mode, layer.bits, layer.group_size)


# --- which layers ------------------------------------------------------------------------------


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that can be quantized, by path."""
    leaves = {path: m for path, m in swap.walk(model) if hasattr(m, "to_quantized")}
    return {path: m for path, m in leaves.items() if isinstance(m.get("weight"), mx.array)}


def requested(
    model: nn.Module,
    default: Storage,
    recipe: str | Predicate | None = None,
    *,
    vision: bool = False,
    audio: bool = False,
) -> dict[str, Storage]:
    """The layers to quantize and how, by path.

    What the model's own ``quant_predicate`` excludes and what reads images or sound stays as it is;
    `vision` and `audio` lift that for such layers. So does a layer whose input is no multiple of
    the group size.

    Args:
        recipe: one of :data:`RECIPES`, or a function (path, module) -> bool or dict, instead of
            `default` for every layer.

    Raises:
        ValueError: an unknown recipe or format, or nothing to quantize.
    """
    own = getattr(model, "quant_predicate", None)
    chosen: dict[str, Storage] = {}
    predicate = mixed(recipe, model, default.group_size) if isinstance(recipe, str) else recipe
    for path, layer in quantizable(model).items():
        allowed: bool | dict[str, Any] = True if own is None else own(path, layer)
        parts = path.split(".")
        for names, asked in ((VISION, vision), (AUDIO, audio)):
            if any(name in parts for name in names):
                allowed = asked
        if allowed and predicate is not None:
            allowed = predicate(path, layer)
        if not allowed:
            continue
        if not isinstance(allowed, (bool, Mapping)):
            raise ValueError(f"{path}: expected true, false or an object, got {allowed!r}")
        each = default if allowed is True else _entry(path, allowed)
        if layer.weight.shape[-1] % each.group_size == 0:
            chosen[path] = each
    if not chosen:
        raise ValueError(f"no layer can be quantized in groups of {default.group_size}")
    return chosen


def mixed(recipe: str, model: nn.Module, group_size: int = 64) -> Predicate:
    """The predicate of a mixed recipe: more bits for layers that matter more.

    Of n decoder layers, those before n/8, from 7n/8 on, and every third in between get more for
    ``down_proj`` and ``v_proj``, the output head (mlx-vlm: and the embedding) always.

    Raises:
        ValueError: an unknown recipe, or a model without any ``down_proj``.
    """
    vlm = recipe.startswith(_VLM)
    table, name = (_MLX_VLM, recipe[len(_VLM) :]) if vlm else (_MLX_LM, recipe)
    if name not in table:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {recipe!r}")
    low, high = (
        Storage("affine", bits, _VLM_GROUP_SIZE if vlm else group_size).keywords()
        for bits in table[name]
    )
    projections = [path for path, _ in swap.walk(model) if "down_proj" in path]
    if not projections:
        raise ValueError(f"recipe {recipe!r} needs layers named down_proj, and there are none")
    parts = projections[0].split(".")
    place = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    layers = len(model.layers)
    values = ("v_proj",) if vlm else ("v_proj", "v_a_proj", "v_b_proj")
    always = ("lm_head", "embed_tokens") if vlm else ("lm_head",)

    def predicate(path: str, module: nn.Module) -> dict[str, Any]:
        parts = path.split(".")
        number = parts[place] if len(parts) > place else "0"
        index = int(number) if number.isdigit() else 0
        first = layers // 8
        more = index < first or index >= 7 * layers // 8 or (index - first) % 3 == 2
        if any(each in path for each in always):
            return dict(high)
        return dict(high if more and any(e in path for e in (*values, "down_proj")) else low)

    return predicate


def of_weights(
    model: nn.Module, block: Block, weights: Mapping[str, mx.array]
) -> dict[str, Storage]:
    """The layers that a quantized checkpoint stores quantized, and how, by path.

    Those are the layers with ``.scales``. A layer that the block does not name, and whose shapes do
    not fit the default, has the one format that they fit, as in mlx-lm.

    Raises:
        TensorError: tensors that do not fit the format which the block states, with what would
            fit; scales without codes; biases that are missing, or are there in a block mode.
    """
    layers = quantizable(model)
    for path in block.paths:
        if path not in layers:
            warnings.warn(f"quantization: {path}: the model has no such layer", stacklevel=3)
    stored: dict[str, Storage] = {}
    for name in weights:
        path = name.removesuffix(".scales")
        if path == name or path not in layers:
            continue  # what no layer takes is refused with the other names
        stated = block.paths.get(path)
        if stated is False:
            raise TensorError(name, f"the configuration says that {path} is not quantized")
        if f"{path}.weight" not in weights:
            raise TensorError(name, f"there are scales, but no {path}.weight")
        fits = fitting(layers[path], weights[f"{path}.weight"], weights[name])
        chosen = stated or block.default
        if chosen != fits:
            if fits is None or stated:
                reason = _misfit(path, chosen, fits, layers[path], weights)
                raise TensorError(f"{path}.weight", reason)
            chosen = fits
        affine, biases = chosen.mode == "affine", f"{path}.biases"
        if affine != (biases in weights):
            raise TensorError(biases, f"{'missing' if affine else 'unexpected'} in {chosen}")
        stored[path] = chosen
    for path, stated in block.paths.items():
        if stated and path in layers and path not in stored:
            raise TensorError(f"{path}.scales", f"missing; the configuration says {stated}")
    return stored


def fitting(layer: nn.Module, weight: mx.array, scales: mx.array) -> Storage | None:
    """The one format whose codes and scales of `layer` have these shapes and dtypes, or None."""
    *rows, columns = layer.weight.shape
    if weight.dtype != mx.uint32 or list(weight.shape[:-1]) != rows or scales.ndim != weight.ndim:
        return None
    if list(scales.shape[:-1]) != rows or not scales.shape[-1]:
        return None
    bits, rest = divmod(weight.shape[-1] * 32, columns)
    group_size, more = divmod(columns, scales.shape[-1])
    if rest or more:
        return None
    modes = {f.mode for f in formats.FORMATS}
    block_modes = scales.dtype == mx.uint8
    if not block_modes and not mx.issubdtype(scales.dtype, mx.floating):
        return None
    for mode in sorted(modes):
        if (mode != "affine") == block_modes:
            try:
                return storage(mode, bits, group_size)
            except ValueError:
                continue
    return None


def _misfit(
    path: str,
    stated: Storage,
    fits: Storage | None,
    layer: nn.Module,
    weights: Mapping[str, mx.array],
) -> str:
    *rows, columns = layer.weight.shape
    codes = [*rows, columns * stated.bits // 32]
    scales = [*rows, columns // stated.group_size]
    got = [list(weights[f"{path}.{name}"].shape) for name in ("weight", "scales")]
    dtypes = [
        str(weights[f"{path}.{n}"].dtype).removeprefix("mlx.core.") for n in ("weight", "scales")
    ]
    what = f"; they fit {fits}" if fits else ""
    return (
        f"{stated} needs codes uint32 {codes} and scales {scales}, "
        f"got {dtypes[0]} {got[0]} and {dtypes[1]} {got[1]}{what}"
    )
