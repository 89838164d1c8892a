"""Quantize the activations of a model whose weights are quantized already."""

from __future__ import annotations

import mlx.nn as mlx_nn

from .accelerate import Left, Replaced, Report, describe
from .nn import QQLinear, swap
from .nn.experts import QQSwitchProduct, SwitchProduct, over
from .nn.layer import ORIGIN
from .nn.merge import separate
from .ops import ACTIVATION_MODES


def quantize_activations(model: mlx_nn.Module, *, skip_unsupported: bool = False) -> Report:
    """Make every quantized linear and switch layer of ``model`` quantize its input too, in place.

    A ``QuantizedLinear`` (MLX's or ours) in mxfp8 or nvfp4 becomes a
    :class:`mlx_lowbit.nn.QQLinear`, a ``QuantizedSwitchLinear`` a ``QQSwitchLinear``. Each module
    stays the same object with the same arrays: loaded weights, scales and biases are kept, none is
    copied or built anew. Quantized embeddings stay weight-only (their rows are looked up), a tied
    output head included. The change is part of the model from then on: :func:`undo` does not revert
    it, and loading the saved model again gives weight-only layers, since the files are the same.
    Products that :func:`accelerate` merged end for these layers; calling it again merges them.

    Args:
        model: a model with quantized layers.
        skip_unsupported: leave layers in another mode weight-only and report them, instead of
            refusing.

    Returns:
        Report: which layers were changed, which were left and why; ``unchanged`` counts those which
        quantized their activations before.

    Raises:
        TypeError: ``model`` is no ``mlx.nn.Module``.
        ValueError: a layer whose mode (or class) does not allow it, naming its path, its mode and
            the modes that do, unless ``skip_unsupported``; or a model without any quantized linear
            or switch layer. Nothing has been changed then.
    """
    swap.check_model(model)
    twins = _twins()
    report, refused, changes = Report(), [], []
    for path, module in swap.walk(model):
        cls = swap.original_class(module)
        base = swap.base_class(cls, twins)
        if isinstance(module, (mlx_nn.QQLinear, QQSwitchProduct)):
            report.unchanged += 1
        elif base is None:
            if swap.holds_quantized_weight(module):
                report.left.append(Left(path, f"{type(module).__name__} stays weight-only"))
        elif module.mode not in ACTIVATION_MODES:
            refused.append(Left(path, f"{type(module).__name__} is in mode {module.mode!r}"))
        elif (twin := _twin(cls, base, twins[base])) is None:
            refused.append(Left(path, swap.own_product(module)))
        else:
            changes.append((module, twin))
            report.replaced.append(Replaced(path, twin.__name__, describe(module)))
    if refused and not skip_unsupported:
        raise ValueError(_refusal(refused))
    if not (changes or refused or report.unchanged):
        raise ValueError(
            "model: expected quantized linear or switch layers in mode "
            f"{_either()}, got none; quantize its weights first, for example with mlx.nn.quantize"
        )
    for module, twin in changes:
        separate(module)
        vars(module).pop(ORIGIN, None)
        object.__setattr__(module, "__class__", twin)
    report.left += refused
    return report


def _twins() -> dict[type, tuple[type, type]]:
    """Every class whose activations can be quantized: ours for it, and the QQ twin."""
    table = swap.classes()
    twins = {mlx_nn.QuantizedLinear: (table[mlx_nn.QuantizedLinear], QQLinear)}
    for base, ours in table.items():
        if issubclass(ours, SwitchProduct):
            twins[base] = (ours, over(QQSwitchProduct, base))
    return twins


def _twin(cls: type, base: type, pair: tuple[type, type]) -> type | None:
    ours, twin = pair
    return twin if cls is ours else swap.joined(cls, base, twin)


def _either() -> str:
    return " or ".join(map(repr, ACTIVATION_MODES))


def _refusal(refused: list[Left]) -> str:
    path, reason = refused[0]
    others = f" (and {len(refused) - 1} more layers)" if len(refused) > 1 else ""
    return (
        f"{path or '(the model itself)'}: {reason}{others}; activations can be quantized in "
        f"{_either()} only. Pass skip_unsupported=True to leave such layers weight-only"
    )
