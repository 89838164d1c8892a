"""One product for layers that take the same input, such as ``q_proj``, ``k_proj`` and ``v_proj``.

What a block computes in one decode step costs MLX more for each operation than for its arithmetic.
Layers that are called with the same x therefore keep their rows in one array; the first one called
computes the product with all of it, and the others take their columns. Each layer still holds its
own parameters, which are slices of that array: names, shapes, files and other readers see no
difference, and a second copy of the weights does not exist.

Of experts, stacks [E, N, K] that are called with the same x and indices, one stack keeps all
matrices, each layer's after those of the layer before. The product takes every index once for each
layer. Slices and results are whole blocks of memory in row order then, so nothing copies them; rows
of gate and up side by side, as [E, 2 N, K], would leave slices that every other reader has to copy.
An index out of range, which makes NaN of a product, still does so for one of the layers at least.
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
from .experts import QQSwitchProduct, SwitchProduct
from .layer import SEAT, stored_global_scale
from .qqlinear import QQLinear, global_scales
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
# The same for stacks, whose classes are joined from one of these and from that of a model package.
_STACK_OPS = {SwitchProduct: "gather_qmm", QQSwitchProduct: "gather_qqmm"}
_ARRAYS = ("weight", "scales", "biases", "bias", "global_scale")
# Up to so many rows of x for each matrix of a layer, one product serves layers of experts. For more
# the kernels read x in tiles, and where its rows are sorted by expert already, as mlx-lm has them
# then, two products read x itself, while one would first copy it for each layer.
_ROWS_OF_MATRIX = 8
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

    __slots__ = ("indices", "left", "parts", "watch", "x")

    def __init__(self, x: mx.array, indices: mx.array | None, parts: list[mx.array]) -> None:
        self.parts: list[mx.array | None] = parts
        self.left = len(parts)
        self.x: mx.array | None = _ext.same_array(x)
        self.indices = None if indices is None else _ext.same_array(indices)
        self.watch = weakref.ref(x, self.drop)

    def drop(self, _: Any) -> None:
        self.x, self.indices, self.parts = None, None, []


class _Thread(threading.local):
    pending: _Pending | None = None


class Siblings:
    """What the layers of a group share.

    Attributes:
        operands: keywords of the op besides x: the merged arrays, the format; None once dissolved.
        limit: the number of elements of x (of indices) up to which the product is shared.
        bounds: where, in the merged arrays, the layers but the first begin.
    """

    def __init__(self, op: str, operands: dict[str, Any], limit: int, bounds: list[int]) -> None:
        self.op = op
        self.operands: dict[str, Any] | None = operands
        self.bounds = bounds
        self.limit = limit
        self.seats: list[Seat] = []
        self.wasted = 0
        self.thread = _Thread()

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


class StackSiblings(Siblings):
    """The same for layers of experts."""

    def __init__(self, op: str, operands: dict[str, Any], limit: int, bounds: list[int]) -> None:
        super().__init__(op, operands, limit, bounds)
        self._starts: dict[int, mx.array] = {}

    def parts(self, x: mx.array, indices: mx.array, **more: Any) -> list[mx.array] | None:
        """The product with x and these indices for every layer, or None."""
        operands = self.operands
        if operands is None or not (isinstance(x, mx.array) and isinstance(indices, mx.array)):
            return None
        if indices.size > self.limit or not mx.issubdtype(indices.dtype, mx.integer):
            return None
        # One dimension before those of the pairs of x and indices.
        starts = self.starts(max(x.ndim - 2, indices.ndim))
        try:
            y = getattr(ops, self.op)(x, rhs_indices=indices + starts, **more, **operands)
        except ValueError:
            return None  # the layer's own product says of its own arguments what is wrong
        return [part.squeeze(0) for part in mx.split(y, len(self.bounds) + 1)]

    def starts(self, dims: int) -> mx.array:
        """Where the layers begin, int64 [layers, 1, ...] with ``dims`` ones.

        Its values are there at once, so that no trace of MLX's takes it for one of its nodes.
        """
        if dims not in self._starts:
            firsts: list[Any] = [0, *self.bounds]
            for _ in range(dims):
                firsts = [[first] for first in firsts]
            self._starts[dims] = mx.array(firsts, mx.int64)
        return self._starts[dims]


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

    def product(
        self, layer: mlx_nn.Module, x: mx.array, *indices: mx.array, **more: Any
    ) -> mx.array | None:
        """The layer's part of a product with x, or None: the layer then computes its own.

        Parameters other than those that were merged end the group, unless they are a tracer's.

        Args:
            indices: those of experts, one array; ``more``: further keywords of their op.
        """
        siblings = self.siblings
        if siblings is None:
            vars(layer).pop(SEAT, None)
            return None
        get, (weight, scales, biases, bias, scale) = layer.get, self.held
        own = (
            get("weight"), weight, get("scales"), scales, get("biases"), biases, get("bias"), bias,
            get("global_scale"), scale,
        )  # fmt: skip
        thread = siblings.thread
        pending = thread.pending
        taken = None if pending is None else pending.parts  # which `drop` may replace
        at = indices[0] if indices else None
        if taken and _ext.same_arrays(x, pending.x, at, pending.indices, *own):
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
        parts = siblings.parts(x, *indices, **more)
        if parts is None:
            return None
        if pending is not None:
            siblings.wasted += 1
            if siblings.wasted >= _PATIENCE:
                siblings.dissolve()
        part, parts[self.index] = parts[self.index], None
        thread.pending = pending = _Pending(x, at, parts)
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
                if _op(layer) is not None and holders[id(layer)] == 1 and not _seated(layer):
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


def _op(layer: mlx_nn.Module | None) -> str | None:
    """The op of ``layer``, or None where its class is not exactly one of ours."""
    cls = type(layer)
    joined = len(cls.__bases__) == 2 and "__call__" not in vars(cls)
    return _OPS.get(cls) or (_STACK_OPS.get(cls.__bases__[0]) if joined else None)


def _stacked(layer: mlx_nn.Module) -> bool:
    return isinstance(layer, SwitchProduct)


def _storage(layer: mlx_nn.Module) -> tuple[Any, ...]:
    """What layers must have in common; the first entry is None if ``layer`` cannot be merged."""
    arrays, stacked = [layer.get(name) for name in _ARRAYS], _stacked(layer)
    mergeable = stacked or (arrays[0].ndim == 2 and layer.get("global_scale") is None)
    return (
        type(layer) if mergeable else None,
        (layer.mode, layer.bits, layer.group_size),
        *(None if a is None else (a.dtype, a.shape[not stacked :]) for a in arrays),
    )


def _aligned(layers: list[mlx_nn.Module]) -> bool:
    # Global scales are read one by one.
    arrays = (layer.get(name) for layer in layers[:-1] for name in _ARRAYS[:-1])
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
    operands |= {"mode": first.mode, "bits": first.bits, "group_size": first.group_size}
    op, bounds = _op(first), ends[:-1]
    if _stacked(first):
        scale = stored_global_scale(operands)
        operands.pop("global_scale", None)
        operands |= global_scales(scale) if op == "gather_qqmm" else {"global_scale": scale}
        siblings = StackSiblings(op, operands, _ROWS_OF_MATRIX * ends[0], bounds)
    else:
        limit = rows * first["scales"].shape[-1] * first.group_size
        siblings = Siblings(op, operands, limit, bounds)
    siblings.seats = [Seat(siblings, index, layer) for index, layer in enumerate(layers)]
    for layer, seat in zip(layers, siblings.seats, strict=True):
        setattr(layer, SEAT, seat)
    return sum(array.nbytes for array in whole.values())
