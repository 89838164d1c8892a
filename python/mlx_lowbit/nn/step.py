"""A transformer block's work for one token, with less of it done in Python.

Decoding one token costs MLX more for building and evaluating its some thousand operations than for
their arithmetic. What a block computes before and after the attention depends on nothing but arrays
whose shapes stay the same from token to token: those two parts are compiled (``mx.compile``), which
hands all their operations over at once. Their products hold the weights instead of having them as
inputs (``fixed_product``) and give queries, keys and values as arrays of their own. With one token
in a sequence the exchange of the axes of heads and tokens moves nothing, and is left out. The cache
and the attention itself are one operation of ours where ``cache_step`` has one, and calls of the
model's own elsewhere.

On an H200 (2026-11-22; 36 layers of 4096, 4 bits, one sequence of 2048 tokens, attention of cuDNN) a
token took the processor 2.0 ms to build and 2.85 ms to evaluate, and takes 1.1 and 2.4 ms so, with
the rotations of queries and keys still outside: 199 tokens a second became 291; bfloat16 has 189.
With ``cache_step`` it is 405 (2026-11-30; bfloat16 191).
"""

from __future__ import annotations

import hashlib
import inspect
import operator
import sys
from collections.abc import Callable, Iterable
from functools import cache
from itertools import chain
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn

from .. import _ext, formats
from ..backend import settled
from . import cache_step, swap
from .quantized import QuantizedLinear

STEP = "_step"
"""Plain attribute, never a parameter: how a block computes one token, or None."""

# Module, block, its attention and its feed-forward layer, with a digest of the text of the three
# forward passes that Step takes apart. Another text, in a version to come, is left alone:
# whether it computes the same is for tests to say (test_step.py), not for a run to find out, where
# the first attention alone takes cuDNN seconds.
KNOWN = {
    ("mlx_lm.models.llama", "TransformerBlock", "Attention", "MLP"): ("c0cb25ad91c01157",),
    ("mlx_lowbit.models.mistral", "TransformerBlock", "Attention", "MLP"): ("f1c3119733ae58ab",),
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")


class Step:
    """What one block computes for one token, from the arrays and layers that it holds now."""

    __slots__ = (
        "after", "attend", "attention", "before", "copies", "kinds", "modules", "periods", "project",
        "values",
    )  # fmt: skip

    def __init__(self, block: mlx_nn.Module, attend: Callable[..., mx.array]) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.attention, self.attend = attention, attend
        # All but the block, which keeps this object: no reference goes back to it.
        self.modules = (
            attention, mlp, attention.rope,
            *(attention[name] for name in _ATTENTION),
            *(mlp[name] for name in _FEED_FORWARD),
            *(block[name] for name in _NORMS),
        )  # fmt: skip
        self.kinds = tuple(map(type, self.modules))
        self.values = list(chain.from_iterable(map(dict.values, (block, *self.modules))))
        # Other Python objects for the same arrays, which `layer.scales *= 2` does not reach.
        self.copies = [
            _ext.same_array(value) if isinstance(value, mx.array) else None for value in self.values
        ]
        norms = [block[name] for name in _NORMS]
        projections = [attention[name] for name in _ATTENTION[:3]]
        heads = attention.n_heads, attention.n_kv_heads
        width = attention.q_proj["weight"].shape[0] // heads[0]
        rope, out = attention.rope, attention.o_proj
        gate, up, down = (mlp[name] for name in _FEED_FORWARD)
        activate = vars(sys.modules[type(mlp).__module__])["swiglu"]

        def project(x: mx.array, strided: bool = True) -> list[mx.array]:
            dims = [(x.shape[0], n, 1, width) for n in (*heads, heads[1])]
            return products(projections, norms[0](x), dims, strided)

        def before(x: mx.array, offset: mx.array) -> tuple[mx.array, ...]:
            # One rotation for the heads of queries and keys where they are one array.
            dims = [(1, n, 1, width) for n in (sum(heads), heads[1])]
            if x.shape[0] == 1 and (parts := shared_product(projections, norms[0](x), dims)):
                return (*mx.split(rope(parts[0], offset=offset), [heads[0]], axis=1), parts[1])
            queries, keys, values = project(x, strided=False)
            return rope(queries, offset=offset), rope(keys, offset=offset), values

        def after(x: mx.array, y: mx.array) -> mx.array:
            batch, dims = x.shape[0], x.shape
            h = x + products([out], y.reshape(batch, 1, -1), [dims])[0]
            wide = [(batch, 1, layer["weight"].shape[0]) for layer in (gate, up)]
            inner = activate(*products([gate, up], norms[1](h), wide))
            return h + products([down], inner, [dims])[0]

        self.project, self.before, self.after = map(mx.compile, (project, before, after))
        self.periods = cache_step.periods_of(rope, width)

    def holds(self, block: mlx_nn.Module) -> bool:
        """Whether ``block`` still consists of the layers and arrays that were compiled."""
        return _ext.unchanged((block, *self.modules), self.values, self.copies) and all(
            map(operator.is_, map(type, self.modules), self.kinds)
        )

    def rotated(self, x: mx.array, cache: Any) -> tuple[mx.array, ...]:
        """Queries, keys and values of x [B, 1, dims], each [B, heads, 1, width]."""
        offset = cache.offset
        return self.before(x, position(offset) if type(offset) is int else offset)

    def __call__(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        """x [B, 1, dims] with a cache -> [B, 1, dims]."""
        scale = self.attention.scale
        if cache_step.ready(cache, mask):
            parts = self.rotated(x, cache) if self.periods is None else self.project(x)
            y = cache_step.attend(cache, *parts, self.periods, scale)
            if y is not None:
                return self.after(x, y)
        cache_step.forget(cache)
        queries, keys, values = self.rotated(x, cache)
        keys, values = cache.update_and_fetch(keys, values)
        cache_step.note(cache, queries.shape[1])
        y = self.attend(queries, keys, values, cache=cache, scale=scale, mask=mask)
        return self.after(x, y)

    def __deepcopy__(self, _: dict[int, Any]) -> None:
        return None  # a copy has arrays of its own

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


_position: tuple[int, mx.array | None] = (-1, None)


def position(offset: int) -> mx.array:
    """``offset`` as an array: one for all blocks that work on a token."""
    global _position
    known, array = _position
    if known != offset or array is None:
        array = mx.array(offset)
        _position = (offset, array)
    return array


Shapes = list[tuple[int, ...]]


def _fixed(first: QuantizedLinear, arrays: Any, x: mx.array, shapes: Shapes) -> list[mx.array]:
    if first.get("global_scale") is not None:
        return []
    names = ("weight", "scales", "biases", "bias")
    fmt = formats.get(first.mode, first.bits, first.group_size)
    return _ext.fixed_product(x, *map(arrays.get, names), fmt.id, shapes)


def shared_product(
    layers: list[QuantizedLinear], x: mx.array, shapes: Shapes, strided: bool = False
) -> list[mx.array]:
    """The merged product of ``layers`` in these shapes; nothing if they do not share it.

    Of several rows its parts are not contiguous: ``strided`` where whoever reads them takes that.
    """
    seats = [layer._seat for layer in layers]
    group = None if seats[0] is None else seats[0].siblings
    if (
        group is None
        or group.operands is None
        or (x.size > group.limit and not strided)
        or list(map(id, seats)) != list(map(id, group.seats))
    ):
        return []
    return _fixed(layers[0], {"weight": group.operands["w"], **group.operands}, x, shapes)


def products(
    layers: list[QuantizedLinear], x: mx.array, shapes: Shapes, strided: bool = False
) -> list[mx.array]:
    """The product of x with each layer, in the shape for it; weights stay what they are."""
    if len(layers) > 1 and (parts := shared_product(layers, x, shapes, strided)):
        return parts
    return [
        (_fixed(layer, layer, x, [shape]) or [layer(x).reshape(shape)])[0]
        for layer, shape in zip(layers, shapes, strict=True)
    ]


class StepBlock:
    """Mixed into a block's class: one token goes through its ``Step``, all else as before."""

    __slots__ = ()
    _step: Step | None = None

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        """The block's own forward pass."""
        step = self._step
        if step is not None and cache is not None and x.shape[1:2] == (1,) and settled(None):
            if step.holds(self):
                if not _ext.is_tracer(x):
                    return step(x, mask, cache)
            elif not any(map(_ext.is_tracer, _arrays(self))):
                vars(self).pop(STEP, None)
        if cache is not None:
            cache_step.forget(cache)
        return super().__call__(x, mask, cache)


def compile_model(modules: Iterable[tuple[str, mlx_nn.Module]]) -> list[str]:
    """Compile the steps of all known blocks that have none; returns their paths."""
    blocks = [(path, module) for path, module in modules if _known(module) and not _done(module)]
    for _, block in blocks:
        _compile(block)
    return [path for path, _ in blocks]


def forget(module: mlx_nn.Module) -> None:
    """Make a block what it was before :func:`compile_model`."""
    if isinstance(module, StepBlock):
        vars(module).pop(STEP, None)
        swap.restore_class(module)


def _arrays(block: mlx_nn.Module) -> list[mx.array]:
    return [a for module in block.modules() for a in module.values() if isinstance(a, mx.array)]


@cache
def forward_digest(*classes: type) -> str | None:
    """A digest of the text of their ``__call__`` without its white space; None without a text."""
    try:
        texts = [inspect.getsource(cls.__call__) for cls in classes]
    except (OSError, TypeError):
        return None
    return hashlib.sha256("".join("".join(texts).split()).encode()).hexdigest()[:16]


def _llama3_rope() -> type | None:
    return getattr(sys.modules.get("mlx_lm.models.rope_utils"), "Llama3RoPE", None)


def _known(block: mlx_nn.Module) -> bool:
    """Whether ``block`` is of a known class, made of layers that compute what they say."""
    for (name, *names), digests in KNOWN.items():
        classes = [getattr(sys.modules.get(name), each, None) for each in names]
        if None in classes or swap.original_class(block) is not classes[0]:
            continue
        attention, mlp = block.get("self_attn"), block.get("mlp")
        if [type(attention), type(mlp)] != classes[1:]:
            continue
        layers = [attention.get(each) for each in _ATTENTION]
        layers += [mlp.get(each) for each in _FEED_FORWARD]
        norms = [block.get(each) for each in _NORMS]
        return (
            all(type(layer) is QuantizedLinear for layer in layers)
            and all(type(norm) is mlx_nn.RMSNorm for norm in norms)
            and type(attention.get("rope")) in (mlx_nn.RoPE, _llama3_rope())
            and forward_digest(*classes) in digests
        )
    return False


def _done(block: mlx_nn.Module) -> bool:
    step = vars(block).get(STEP)
    return step is not None and step.holds(block)


def _compile(block: mlx_nn.Module) -> None:
    module = sys.modules[swap.original_class(block).__module__]
    if not isinstance(block, StepBlock):
        cls = type(block)
        known = (each for each in cls.__subclasses__() if each.__bases__ == (StepBlock, cls))
        made = next(known, None) or type(
            cls.__name__, (StepBlock, cls), {"__module__": __name__, "__doc__": cls.__doc__}
        )
        swap.change_class(block, made)
    vars(block).pop(STEP, None)
    vars(block)[STEP] = Step(block, module.scaled_dot_product_attention)
