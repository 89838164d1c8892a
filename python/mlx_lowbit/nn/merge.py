"""One product for layers that take the same input, such as ``q_proj``, ``k_proj`` and ``v_proj``.

What a block computes in one decode step costs MLX more for each operation than for its arithmetic.
Layers that are called with the same x therefore keep their rows in one array; the first one called
computes the product with all of it, and the others take their columns. Each layer still holds its
own parameters, which are slices of that array: names, shapes, files and other readers see no
difference, and a second copy of the weights does not exist.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as mlx_nn

from .. import _ext, ops
from .layer import SEAT
from .qqlinear import QQLinear
from .quantized import QuantizedLinear

# Names of layers in mlx-lm's models that are called with the same x, and the number of rows of x up
# to which one product serves them. The columns of several rows are not contiguous: RoPE first
# copies such queries and keys, while an activation reads its two operands with strides.
KNOWN: tuple[tuple[tuple[str, ...], int], ...] = (
    (("q_proj", "k_proj", "v_proj"), 1),
    (("q_a_proj", "kv_a_proj_with_mqa"), 1),
    (("in_proj_qkvz", "in_proj_ba"), 1),
    (("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"), 1),
    (("gate_proj", "up_proj"), 32),
    (("w1", "w3"), 32),
    (("c_fc_0", "c_fc_1"), 32),
)
# Which op computes the product of a class. A class that extends one of these is left alone, since
# it may call its product with another x.
_OPS = {QuantizedLinear: "quantized_matmul", QQLinear: "qqmm"}
_ARRAYS = ("weight", "scales", "biases", "bias")
# Slices begin at multiples of this many bytes, as arrays of their own do, for vector loads.
_ALIGNMENT = 16
# Products in a row that not every layer took its part of, before the layers go separate ways.
_PATIENCE = 3


class Merged(NamedTuple):
    """Layers that share one product: the path of their parent, their names, their bytes."""

    path: str
    names: tuple[str, ...]
    bytes: int


class _Pending:
    """A product whose parts are being fetched; it ends with the Python object that was x."""

    __slots__ = ("left", "parts", "watch", "x")

    def __init__(self, x: mx.array, parts: list[mx.array]) -> None:
        self.parts: list[mx.array | None] = parts
        self.left = len(parts)
        self.x: mx.array | None = _ext.same_array(x)
        self.watch = weakref.ref(x, self.drop)

    def drop(self, _: Any) -> None:
        self.x, self.parts = None, []


class _Thread(threading.local):
    pending: _Pending | None = None


class Siblings:
    """What the layers of a group share.

    Attributes:
        operands: keywords of the op besides x: the merged arrays, the format; None once dissolved.
        limit: the number of elements of x up to which the product is shared.
    """

    def __init__(self, op: str, operands: dict[str, Any], rows: int, bounds: list[int]) -> None:
        self.op = op
        self.operands: dict[str, Any] | None = operands
        self.bounds = bounds
        self.seats: list[Seat] = []
        self.wasted = 0
        self.thread = _Thread()
        scales, group_size = operands["scales"], operands["group_size"]
        self.limit = rows * scales.shape[-1] * group_size

    def dissolve(self) -> None:
        """Let go of the merged arrays; the layers compute their own products from now on."""
        self.operands = None
        self.thread = _Thread()
        for seat in self.seats:
            seat.siblings, seat.held = None, ()

    def parts(self, x: mx.array) -> list[mx.array] | None:
        """The product with x for every layer, or None where there is none to share."""
        operands = self.operands
        if operands is None or not isinstance(x, mx.array) or x.size > self.limit:
            return None
        return mx.split(getattr(ops, self.op)(x, **operands), self.bounds, -1)


class Seat:
    """The place of one layer among its siblings, kept in the attribute ``SEAT`` of the layer.

    It works for copies of the layer too, as long as they hold the same arrays.
    """

    __slots__ = ("held", "index", "siblings")

    def __init__(self, siblings: Siblings, index: int, layer: mlx_nn.Module) -> None:
        self.siblings: Siblings | None = siblings
        self.index = index
        # Other Python objects for the same arrays, which `layer.scales *= 2` does not reach.
        held = (layer.get(name) for name in _ARRAYS)
        self.held = tuple(None if a is None else _ext.same_array(a) for a in held)

    def product(self, layer: mlx_nn.Module, x: mx.array) -> mx.array | None:
        """The layer's part of a product with x, or None: the layer then computes its own.

        Parameters other than those that were merged end the group, unless they are a tracer's.
        """
        siblings = self.siblings
        if siblings is None:
            vars(layer).pop(SEAT, None)
            return None
        get, (weight, scales, biases, bias) = layer.get, self.held
        own = get("weight"), weight, get("scales"), scales, get("biases"), biases, get("bias"), bias
        thread = siblings.thread
        pending = thread.pending
        taken = None if pending is None else pending.parts  # which `drop` may replace
        if taken and _ext.same_arrays(x, pending.x, *own):
            part, taken[self.index] = taken[self.index], None
            if part is not None:
                pending.left -= 1
                if not pending.left:
                    thread.pending, siblings.wasted = None, 0
                return part
        elif not _ext.same_arrays(*own):
            if not any(isinstance(a, mx.array) and _ext.is_tracer(a) for a in own):
                siblings.dissolve()  # a transformation would put the former ones back
            return None
        parts = siblings.parts(x)
        if parts is None:
            return None
        if pending is not None:
            siblings.wasted += 1
            if siblings.wasted >= _PATIENCE:
                siblings.dissolve()
        part, parts[self.index] = parts[self.index], None
        thread.pending = pending = _Pending(x, parts)
        pending.left -= 1
        return part

    def __deepcopy__(self, _: dict[int, Any]) -> Seat:
        return self

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()  # a layer from a file has arrays of its own


def merge_model(modules: Iterable[tuple[str, mlx_nn.Module]]) -> list[Merged]:
    """Merge the layers of every module that are called with one x, group after group.

    Args:
        modules: every module of a model once, with its path.
    """
    modules = list(modules)
    holders = Counter(id(child) for _, module in modules for child in _children(module))
    merged = []
    for path, parent in modules:
        for known, rows in KNOWN:
            alike: dict[tuple[Any, ...], list[str]] = {}
            for name in known:
                layer = parent.get(name)
                if type(layer) in _OPS and holders[id(layer)] == 1 and not _seated(layer):
                    alike.setdefault(_storage(layer), []).append(name)
            for key, names in alike.items():
                if len(names) > 1 and key[0] is not None and _aligned([parent[n] for n in names]):
                    size = _merge([parent[name] for name in names], rows)
                    merged.append(Merged(path, tuple(names), size))
    return merged


def separate(module: mlx_nn.Module) -> None:
    """End the sharing of products for ``module``; its parameters stay the slices they are."""
    seat = vars(module).pop(SEAT, None)
    if seat is not None and seat.siblings is not None:
        seat.siblings.dissolve()


def _children(module: mlx_nn.Module) -> Iterator[mlx_nn.Module]:
    """The modules that ``module`` itself holds, in containers too, as often as it does."""
    stack = list(module.values())
    while stack:
        value = stack.pop()
        if isinstance(value, mlx_nn.Module):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            stack.extend(value.values() if isinstance(value, dict) else value)


def _seated(layer: mlx_nn.Module) -> bool:
    seat = getattr(layer, SEAT)
    return seat is not None and seat.siblings is not None


def _storage(layer: mlx_nn.Module) -> tuple[Any, ...]:
    """What layers must have in common; the first entry is None if ``layer`` cannot be merged."""
    arrays = [layer.get(name) for name in _ARRAYS]
    mergeable = arrays[0].ndim == 2 and layer.get("global_scale") is None
    return (
        type(layer) if mergeable else None,
        (layer.mode, layer.bits, layer.group_size),
        *(None if a is None else (a.dtype, a.shape[1:]) for a in arrays),
    )


def _aligned(layers: list[mlx_nn.Module]) -> bool:
    arrays = (layer.get(name) for layer in layers[:-1] for name in _ARRAYS)
    return all(a is None or a.nbytes % _ALIGNMENT == 0 for a in arrays)


def _merge(layers: list[mlx_nn.Module], rows: int) -> int:
    """Store the parameters of ``layers`` in one array each; returns the bytes of all of them.

    The former arrays are let go at once, and their memory is given back, so that a model needs
    room for one group beyond its own size.
    """
    first = layers[0]
    ends = list(accumulate(layer["weight"].shape[0] for layer in layers))
    whole = {
        name: mx.concatenate([layer[name] for layer in layers])
        for name in _ARRAYS
        if first.get(name) is not None
    }
    mx.eval(whole)
    for layer, (start, end) in zip(layers, pairwise([0, *ends]), strict=True):
        for name, array in whole.items():
            layer[name] = array[start:end]
    # Evaluated slices share the buffer of what they are slices of.
    mx.eval([layer[name] for layer in layers for name in whole])
    mx.clear_cache()
    operands = {"w" if name == "weight" else name: array for name, array in whole.items()}
    settings = {"mode": first.mode, "bits": first.bits, "group_size": first.group_size}
    siblings = Siblings(_OPS[type(first)], {**operands, **settings}, rows, ends[:-1])
    siblings.seats = [Seat(siblings, index, layer) for index, layer in enumerate(layers)]
    for layer, seat in zip(layers, siblings.seats, strict=True):
        setattr(layer, SEAT, seat)
    return sum(array.nbytes for array in whole.values())
