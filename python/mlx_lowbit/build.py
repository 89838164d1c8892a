"""Making a model from tensors: quantized as they are stored, or quantized or decoded on the way.

Everything here is lazy: no parameter is computed before the caller evaluates it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from . import ops, recipes
from .checkpoint import TensorError
from .recipes import Predicate, Storage

_SHOWN = 5  # modules that a message names
_LAYERS = ("num_hidden_layers", "encoder_layers")


@dataclass(frozen=True)
class Change:
    """What is made of a checkpoint on the way.

    Attributes:
        storage: quantize to this, or None.
        recipe: which layers how, see :func:`mlx_lowbit.recipes.requested`.
        vision, audio: quantize such layers as well.
        dtype: of the floating parameters, or None for what the files have.
        dequantize: store quantized layers in floats.
    """

    storage: Storage | None = None
    recipe: str | Predicate | None = None
    vision: bool = False
    audio: bool = False
    dtype: mx.Dtype | None = None
    dequantize: bool = False


def build(
    module: Any,
    config: dict[str, Any],
    change: Change,
    weights: dict[str, mx.array] | None = None,
) -> nn.Module:
    """A model with its parameters unevaluated.

    Args:
        module: with ``Model`` and ``ModelArgs``.
        weights: as in the files; None for random ones (which take no memory until evaluated).

    Raises:
        TensorError: a tensor that does not fit.
        ValueError: as :func:`load`.
    """
    model, block = _configured(module, config, None if weights is None else len(weights))
    if weights is None:
        weights = dict(tree_flatten(model.parameters()))
    elif hasattr(model, "sanitize"):
        try:
            weights = model.sanitize(weights)
        except KeyError as error:
            raise TensorError(str(error.args[0]), "missing") from error
    if change.dtype is not None:
        weights = _cast(model, weights, change.dtype)
    stored = {} if block is None else recipes.of_weights(model, block, weights)
    if change.storage is not None:
        if stored:
            kinds = ", ".join(sorted({str(each) for each in stored.values()}))
            raise ValueError(f"the model is quantized already ({kinds})")
        stored = recipes.requested(
            model, change.storage, change.recipe, vision=change.vision, audio=change.audio
        )
        _quantize(model, stored, weights)
    elif change.dequantize:
        if not stored:
            raise ValueError("the model is not quantized")
        _dequantize(stored, weights, change.dtype or float_dtype(config) or mx.bfloat16)
        stored = {}
    _replace_layers(model, stored, weights)
    _check_parameters(model, weights)
    model.load_weights(list(weights.items()))
    return model


def _configured(
    module: Any, config: dict[str, Any], tensors: int | None
) -> tuple[nn.Module, recipes.Block | None]:
    """The model of a configuration, and how it says that its stored weights are quantized.

    Args:
        tensors: how many the files hold; None without files.
    """
    try:
        if tensors is not None:
            _check_layers(config, tensors)
        model = module.Model(module.ModelArgs.from_dict(config)).eval()
        return model, None if tensors is None else recipes.read_block(config)
    except ValueError as error:
        raise ValueError(f"config.json: {error}") from error
    # What mlx-lm's models make of missing and of wrong values.
    except (TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"config.json: it does not fit the model: {error}") from error


def _check_layers(config: Mapping[str, Any], tensors: int) -> None:
    """Refuses more layers than tensors, before making them takes all memory."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_layers(value, tensors)
        elif name in _LAYERS and isinstance(value, int) and value > tensors:
            raise ValueError(f"{name}: {value} layers, and the files hold {tensors} tensors")


def float_dtype(config: Mapping[str, Any]) -> mx.Dtype | None:
    """The dtype that a configuration states for its floating parameters, or None."""
    for part in (config, config.get("text_config"), config.get("thinker_config")):
        for key in ("torch_dtype", "dtype"):
            name = part.get(key) if isinstance(part, Mapping) else None
            if name in ("float16", "bfloat16", "float32"):
                return getattr(mx, name)
    return None


def _cast(model: nn.Module, weights: dict[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    allowed: Callable[[str], bool] = getattr(model, "cast_predicate", lambda path: True)
    return {
        name: value.astype(dtype)
        if mx.issubdtype(value.dtype, mx.floating) and allowed(name)
        else value
        for name, value in weights.items()
    }


def _quantize(
    model: nn.Module, stored: Mapping[str, Storage], weights: dict[str, mx.array]
) -> None:
    layers = recipes.quantizable(model)
    for path, storage in stored.items():
        name = f"{path}.weight"
        if name not in weights:
            raise TensorError(name, "missing")
        _check_tensor(name, layers[path].weight, weights[name])
        try:
            parts = ops.quantize(weights.pop(name), nan_policy="propagate", **storage.keywords())
        except ValueError as error:
            raise TensorError(name, str(error)) from error
        for kind, part in zip(("weight", "scales", "biases"), parts, strict=True):
            if part is not None:
                weights[f"{path}.{kind}"] = part


def _dequantize(
    stored: Mapping[str, Storage], weights: dict[str, mx.array], dtype: mx.Dtype
) -> None:
    for path, storage in stored.items():
        scales = weights.pop(f"{path}.scales")
        weights[f"{path}.weight"] = ops.dequantize(
            weights[f"{path}.weight"],
            scales,
            weights.pop(f"{path}.biases", None),
            global_scale=weights.pop(f"{path}.global_scale", None),
            dtype=scales.dtype if storage.mode == "affine" else dtype,
            **storage.keywords(),
        )


def _replace_layers(
    model: nn.Module, stored: Mapping[str, Storage], weights: Mapping[str, mx.array]
) -> None:
    """Puts MLX's quantized layers in place; their arrays are never computed."""
    if not stored:
        return
    new: dict[int, nn.Module] = {}
    for path, layer in recipes.quantizable(model).items():
        if path not in stored:
            continue
        new[id(layer)] = quantized = layer.to_quantized(**stored[path].keywords())
        if f"{path}.global_scale" in weights:
            if stored[path].mode != "nvfp4":
                raise TensorError(f"{path}.global_scale", "only mode nvfp4 has one")
            quantized.global_scale = mx.zeros(quantized.weight.shape[:-2])
    leaves = tree_map(
        lambda m: new.get(id(m), m), model.leaf_modules(), is_leaf=nn.Module.is_module
    )
    model.update_modules(leaves)


def _check_parameters(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    expected = dict(tree_flatten(model.parameters()))
    missing = [name for name in expected if name not in weights]
    extra = [name for name in weights if name not in expected]
    if missing or extra:
        parts = [
            _listed(names, what)
            for names, what in ((missing, "missing"), (extra, "unexpected"))
            if names
        ]
        cause = "an incomplete download?" if not extra else "a configuration of another model?"
        raise TensorError((missing or extra)[0], f"{'; '.join(parts)}; {cause}")
    for name, own in expected.items():
        _check_tensor(name, own, weights[name])


def _check_tensor(name: str, own: mx.array, got: mx.array) -> None:
    floating = mx.issubdtype(own.dtype, mx.floating)
    same = mx.issubdtype(got.dtype, mx.floating) if floating else got.dtype == own.dtype
    if got.shape != own.shape or not same:
        kind = "floats" if floating else str(own.dtype).removeprefix("mlx.core.")
        dtype = str(got.dtype).removeprefix("mlx.core.")
        raise TensorError(name, f"expected {kind} {list(own.shape)}, got {dtype} {list(got.shape)}")


def _listed(names: list[str], what: str) -> str:
    """Names by module, the first few."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for name in names:
        owner, _, last = name.rpartition(".")
        grouped[owner].append(last)
    shown = [f"{owner} ({', '.join(last)})".strip() for owner, last in grouped.items()][:_SHOWN]
    more = ", ..." if len(grouped) > _SHOWN else ""
    return f"{len(names)} tensors {what}: {', '.join(shown)}{more}"
