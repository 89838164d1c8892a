"""Swap the layers of a loaded model for ours, in place, and back."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as mlx_nn

from . import formats
from .backend import missing_kernel
from .nn import swap
from .nn.layer import FLOATS, ORIGIN, LowbitLayer
from .nn.merge import Merged, merge_model, separate
from .nn.step import compile_model, forget
from .ops import ACTIVATION_MODES

_BACKENDS = ("auto", "lowbit", "mlx")


class Replaced(NamedTuple):
    """One layer that was changed: its path, its new class and its format (or dtype, if dense)."""

    path: str
    kind: str
    format: str


class Left(NamedTuple):
    """One layer that was left as it was, and why."""

    path: str
    reason: str


@dataclass
class Report:
    """What a call did to a model; ``print(report)`` shows it as one table.

    Attributes:
        replaced: the layers that were changed, in the order of the model.
        left: layers that might have been expected among them, with the reason why they are not.
        merged: layers that share one product from this call on, with the bytes of their parameters.
        compiled: paths of the blocks whose work for one token is compiled from this call on.
        unchanged: how many layers already were what the call makes of them.
        cache_bytes: memory that the changed layers hold beyond the model's own arrays. No backend
            keeps a repacked copy of a weight now, so it is 0.
    """

    replaced: list[Replaced] = field(default_factory=list)
    left: list[Left] = field(default_factory=list)
    merged: list[Merged] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    unchanged: int = 0
    cache_bytes: int = 0

    def __str__(self) -> str:
        rows = [(_pattern(path), kind, fmt) for path, kind, fmt in self.replaced]
        rows += [(_pattern(path), "left", reason) for path, reason in self.left]
        rows += [(_pattern(path), "merged", " ".join(names)) for path, names, _ in self.merged]
        rows += [(_pattern(path), "compiled", "one token") for path in self.compiled]
        lines = [("layers", "path", "now", "format or reason")]
        lines += [(str(count), *row) for row, count in Counter(rows).items()]
        wide = [max(len(line[column]) for line in lines) for column in range(3)]
        table = [
            f"{count:>{wide[0]}}  {path:<{wide[1]}}  {now:<{wide[2]}}  {what}"
            for count, path, now, what in lines
        ]
        total = (
            f"{len(self.replaced)} replaced, {len(self.left)} left, {self.unchanged} unchanged; "
            f"private caches: {self.cache_bytes} bytes"
        )
        if self.merged:
            size = sum(group.bytes for group in self.merged)
            total += f"; {len(self.merged)} merged products over {size} bytes"
        return "\n".join([*(table if rows else ()), total])


def _pattern(path: str) -> str:
    """``path`` with its list positions starred, so that the layers of a stack fall into one row."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", path) or "(the model itself)"


def accelerate(
    model: mlx_nn.Module,
    *,
    backend: str = "auto",
    merge: bool | None = None,
    compile: bool | None = None,
) -> Report:
    """Run the quantized layers of ``model`` on this package's kernels, changing it in place.

    ``mlx.nn.QuantizedLinear``, ``QuantizedEmbedding`` and ``QQLinear``, mlx-lm's and mlx-vlm's
    ``QuantizedSwitchLinear`` and ``QuantizedMultiLinear`` become this package's layers of the same
    name; with a CPU as the default device, dense ``mlx.nn.Linear`` in float32, float16 or bfloat16
    do too. A class that extends one of these and passes its work to ``super().__call__`` is
    covered. Each module stays the same object with the same arrays: parameter names, files saved
    from it, tied layers, frozen parameters and ``isinstance`` tests are unaffected, no weight is
    copied, and :func:`undo` is exact. Calling it again does nothing. What the layers then run
    follows :func:`mlx_lowbit.set_backend`.

    On an NVIDIA GPU, where a decode step costs more for each operation than for its arithmetic,
    layers that are called with the same x compute one product: ``q_proj``, ``k_proj`` and
    ``v_proj`` of a parent, ``gate_proj`` and ``up_proj`` (those of experts too, with the same
    choice of experts), and some others, as far as they are stored in the same format. Their
    parameters are evaluated and become slices of one array: same names, shapes, bits and files, no
    second copy, except where other code holds on to the former arrays. A layer whose parameters
    change later (loading, casting, training, in place as well), or which is called with another x,
    computes its own product, and soon all of its group do, until accelerate is called again.
    Results do not depend on it beyond the rounding of float32 sums.

    For the same reason, what a transformer block of a known class (Llama's and Mistral's in mlx-lm)
    computes for one token before and after its attention is compiled, with the bits of the block's
    own forward pass. On CUDA its attention, to a plain KV cache in bfloat16 or float16, with heads
    of 64 or 128 dims, is a kernel of this package, which writes into the cache as well; its results
    are those of float32 sums, rounded once. A block whose parameters or layers change later runs
    its own pass again, as all do for more than one token and without a cache.

    What a model computes without such a layer stays with MLX, for example attention over a
    quantized KV cache. A function that ``mx.compile`` has traced already keeps what it traced.

    Args:
        model: a model of mlx-lm, of mlx-vlm, or any ``mlx.nn.Module``, a single layer included.
        merge: share products among layers with the same x; None means on an NVIDIA GPU as the
            default device. ``False`` ends the sharing of an earlier call.
        compile: compile the work of blocks for one token; None means on an NVIDIA GPU as the
            default device. ``False`` ends what an earlier call began.
        backend: ``"auto"`` changes the layers whose format has a kernel for the default device;
            ``"lowbit"`` those of every format of this package whatever the device (for a model that
            will run on a stream of another one); ``"mlx"`` leaves MLX's layers, putting back those
            changed earlier.

    Returns:
        Report: which layers were changed, which were left and why.

    Raises:
        TypeError: ``model`` is no ``mlx.nn.Module``, or ``merge`` or ``compile`` neither a bool
            nor None.
        ValueError: an unknown ``backend``.

    Example:
        >>> model, tokenizer = mlx_lm.load(path)
        >>> print(mlx_lowbit.accelerate(model))
    """
    swap.check_model(model)
    if backend not in _BACKENDS:
        names = ", ".join(map(repr, _BACKENDS))
        raise ValueError(f"backend: expected one of {names}, got {backend!r}")
    for argument, value in (("merge", merge), ("compile", compile)):
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{argument}: expected True, False or None, got {value!r}")
    if backend == "mlx":
        return undo(model)
    table, report, changes = swap.classes(), Report(), []
    for path, module in swap.walk(model):
        base = swap.base_class(type(module), table)
        if isinstance(module, LowbitLayer):
            report.unchanged += 1
        elif base is None:
            if swap.holds_quantized_weight(module):
                report.left.append(Left(path, swap.own_product(module)))
        elif base is not mlx_nn.Linear or mx.default_device().type == mx.cpu:
            cls = swap.joined(type(module), base, table[base])
            reason = _obstacle(module, base, cls, backend)
            if reason is None:
                changes.append((module, cls))
                report.replaced.append(Replaced(path, cls.__name__, describe(module)))
            else:
                report.left.append(Left(path, reason))
    for module, cls in changes:
        swap.change_class(module, cls)
    on_gpu = mx.default_device().type == mx.gpu and not mx.metal.is_available()
    if merge or (merge is None and on_gpu):
        report.merged = merge_model(swap.walk(model))
    elif merge is not None:
        for _, module in swap.walk(model):
            separate(module)
    if compile is not None or report.replaced or report.merged or merge is False:
        for _, module in swap.walk(model):
            forget(module)
    if compile or (compile is None and on_gpu):
        report.compiled = compile_model(swap.walk(model))
    return report


def undo(model: mlx_nn.Module) -> Report:
    """Give every layer that :func:`accelerate` changed its former class back, in place.

    The parameters keep their bits throughout (those of merged products stay slices of one array),
    so the model computes bit for bit what it did before. Layers that were made as this package's
    own, by their constructors or by :func:`quantize_activations`, stay; on a model that was not
    accelerated nothing happens.

    Returns:
        Report: which layers were changed back, which were left and why.

    Raises:
        TypeError: ``model`` is no ``mlx.nn.Module``.
    """
    swap.check_model(model)
    report = Report()
    for path, module in swap.walk(model):
        separate(module)
        forget(module)
        if ORIGIN in vars(module):
            swap.restore_class(module)
            report.replaced.append(Replaced(path, type(module).__name__, describe(module)))
        elif isinstance(module, LowbitLayer):
            report.left.append(Left(path, f"{type(module).__name__} was not made by accelerate"))
    return report


def describe(module: mlx_nn.Module) -> str:
    """The format in which ``module`` stores its weight, or the dtype of a dense one."""
    if not swap.holds_quantized_weight(module):
        return str(module["weight"].dtype).removeprefix("mlx.core.")
    return formats.get(mode=module.mode, bits=module.bits, group_size=module.group_size).name


def _obstacle(
    module: mlx_nn.Module, base: type, cls: type[mlx_nn.Module] | None, backend: str
) -> str | None:
    """Why ``module`` cannot become a ``cls``, or None if it can."""
    weight = module.get("weight")
    if cls is None:
        return swap.own_product(module)
    if base is mlx_nn.Linear:
        dtype = getattr(weight, "dtype", None)
        return None if dtype in FLOATS else f"no kernel for weights of dtype {dtype}"
    if not swap.holds_quantized_weight(module):
        return "its weight is not quantized (a QQLinear in training mode: call eval() first)"
    if base is mlx_nn.QQLinear and module.mode not in ACTIVATION_MODES:
        return f"activations cannot be quantized in mode {module.mode!r}"
    try:
        formats.get(mode=module.mode, bits=module.bits, group_size=module.group_size)
    except ValueError as error:
        return f"no kernel: {error}"
    return missing_kernel() if backend == "auto" else None
