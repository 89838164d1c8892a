"""Changing layers of a model into ours in place, by giving the module object another class.

A layer of ours has the same parameters as the one it stands for, so nothing else has to change: the
object keeps its identity (tied layers, references held in private attributes, closures), its
arrays, its frozen set and its training flag. Replacing objects through ``Module.update_modules``
would reach only what ``Module.children`` shows, would untie shared layers, and could not replace
the model itself.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn

from .experts import MultiProduct, SwitchProduct, over
from .layer import ORIGIN, LowbitLayer
from .linear import Linear
from .qqlinear import QQLinear
from .quantized import QuantizedEmbedding, QuantizedLinear

LayerClass = type[mlx_nn.Module]

# (module, class, its product) in the packages which define stacked layers.
_STACKED = (
    ("switch_layers", "QuantizedSwitchLinear", SwitchProduct),
    ("mla", "QuantizedMultiLinear", MultiProduct),
)
_MODEL_PACKAGES = ("mlx_lm", "mlx_vlm")


def classes() -> dict[LayerClass, LayerClass]:
    """Every class that can be swapped, with ours for it.

    mlx-lm's and mlx-vlm's are there once the package is imported, without which no model holds
    them.
    """
    table: dict[LayerClass, LayerClass] = {
        mlx_nn.QuantizedLinear: QuantizedLinear,
        mlx_nn.QuantizedEmbedding: QuantizedEmbedding,
        mlx_nn.QQLinear: QQLinear,
        mlx_nn.Linear: Linear,
    }
    if "mlx_lm.models.switch_layers" in sys.modules:
        # `over` then finds the classes that are spelled out there.
        importlib.import_module(".switch_layers", __package__)
    for package in _MODEL_PACKAGES:
        for module, name, product in _STACKED:
            base = getattr(sys.modules.get(f"{package}.models.{module}"), name, None)
            if base is not None:
                table[base] = over(product, base)
    return table


def walk(model: mlx_nn.Module) -> Iterator[tuple[str, mlx_nn.Module]]:
    """Every module below ``model`` and itself, once, with its first path ("" for ``model``).

    Unlike ``Module.named_modules`` it goes through tuples as well, and in the order of definition.
    """
    seen: set[int] = set()

    def visit(path: str, value: Any) -> Iterator[tuple[str, mlx_nn.Module]]:
        if id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, mlx_nn.Module):
            yield path, value
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in children:
            if isinstance(child, (dict, list, tuple)):
                yield from visit(f"{path}.{key}" if path else str(key), child)

    yield from visit("", model)


def original_class(module: mlx_nn.Module) -> LayerClass:
    """The class of ``module`` before ``accelerate``."""
    return vars(module).get(ORIGIN, type(module))


def base_class(cls: LayerClass, table: dict[LayerClass, LayerClass]) -> LayerClass | None:
    """The nearest class in ``table`` which ``cls`` is or extends."""
    return next((base for base in cls.__mro__ if base in table), None)


def holds_quantized_weight(module: mlx_nn.Module) -> bool:
    """Whether ``module`` itself stores packed codes with scales."""
    weight = module.get("weight")
    return isinstance(weight, mx.array) and weight.dtype == mx.uint32 and "scales" in module


def own_product(module: mlx_nn.Module) -> str:
    """The reason why a layer is left whose class overrides the call."""
    return f"{type(module).__name__} computes its product itself"


def check_model(model: object) -> None:
    """Refuse what is no ``mlx.nn.Module`` with a TypeError."""
    if not isinstance(model, mlx_nn.Module):
        raise TypeError(f"model: expected an mlx.nn.Module, got {type(model).__name__}")


def joined(cls: LayerClass, base: LayerClass, ours: LayerClass) -> LayerClass | None:
    """The class which is ``cls`` with the product of ``ours`` instead of that of ``base``.

    For ``base`` itself that is ``ours``. A class that extends ``base`` keeps its methods and gets
    ``ours`` between itself and ``base``, so that its ``super().__call__`` arrives at our product.
    None if such a class computes its product itself.
    """
    if cls is base or cls is ours:
        return ours
    if issubclass(cls, LowbitLayer):
        return None
    between = cls.__mro__[: cls.__mro__.index(base)]
    calls = [vars(each)["__call__"] for each in between if "__call__" in vars(each)]
    if not all(_hands_over(call) for call in calls):
        return None
    for known in cls.__subclasses__():
        if known.__bases__ == (cls, ours):
            return known
    return type(cls.__name__, (cls, ours), {"__module__": __name__, "__doc__": cls.__doc__})


def _hands_over(call: Any) -> bool:
    code = getattr(call, "__code__", None)
    return code is not None and "super" in code.co_names


def change_class(module: mlx_nn.Module, cls: LayerClass) -> None:
    """Make ``module`` a ``cls`` and remember what it was before the first change."""
    vars(module).setdefault(ORIGIN, type(module))
    object.__setattr__(module, "__class__", cls)


def restore_class(module: mlx_nn.Module) -> None:
    """Make ``module`` what it was before ``change_class``."""
    object.__setattr__(module, "__class__", vars(module).pop(ORIGIN))
