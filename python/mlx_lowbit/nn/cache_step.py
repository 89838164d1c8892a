"""One token's attention in the memory of its cache, where a GPU has a kernel for it.

mlx-lm's cache hands its arrays to MLX's slice update and then slices of them to MLX's attention;
``_ext.cache_step`` writes and attends in one operation. It writes in place, whoever else holds that
memory, and so only where a cache is in the state in which its own method, or this one, left it
(``Known``): others may then hold what it was before, but nothing that lies behind its last token. In
any other state (copied, trimmed, given other arrays) its own method has the next token, and MLX
copies what others hold.

On an H200 (2026-11-30; the model of step.py) a token in 4 bits takes 2.7 ms so and 4.4 without, at
batch 16 4.3 and 6.5 to 8.3.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn

from .. import _ext

KNOWN = "_lowbit_known"
"""Plain attribute of a cache, which its copies do not get."""


class Known:
    """The state that a cache was left in.

    MLX writes into the memory of an array only for its last owner: while this owns the cache's
    arrays nobody does, and no other array has their identity.
    """

    __slots__ = ("keys", "offset", "values")

    def __init__(self, cache: Any) -> None:
        self.offset = cache.offset
        # Other Python objects for the same arrays, which `cache.keys[...] = x` does not reach.
        self.keys, self.values = _ext.same_array(cache.keys), _ext.same_array(cache.values)

    def still(self, cache: Any) -> bool:
        """Whether ``cache`` is in that state."""
        return self.offset == cache.offset and _ext.same_arrays(
            self.keys, cache.keys, self.values, cache.values
        )

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def note(cache: Any, heads: int) -> None:
    """To be called when ``cache.update_and_fetch`` has returned; heads: of queries."""
    kind = getattr(sys.modules.get("mlx_lm.models.cache"), "KVCache", None)
    if type(cache) is kind and _ext.takes_cache_step(cache.keys, heads):
        setattr(cache, KNOWN, Known(cache))


def forget(cache: Any) -> None:
    """To be called before ``cache.update_and_fetch``, which may write in place then too."""
    if hasattr(cache, KNOWN):
        delattr(cache, KNOWN)


def ready(cache: Any, mask: Any) -> bool:
    """Whether :func:`attend` can have the next token of ``cache``."""
    known = getattr(cache, KNOWN, None)
    return (
        known is not None
        and mask is None
        and cache.offset < cache.keys.shape[2]
        and known.still(cache)
    )


def attend(
    cache: Any, q: mx.array, k: mx.array, v: mx.array, periods: mx.array | None, scale: float
) -> mx.array | None:
    """The attention of q [B, heads, 1, D] to ``cache`` with k and v [B, H, 1, D]; like q.

    q and k are rotated by their position over ``periods`` first, if there are any. None, and
    nothing is changed, where the kernel does not take the arrays.
    """
    made = _ext.cache_step(cache.keys, cache.values, q, k, v, periods, cache.offset, scale)
    if not made:
        return None
    y, cache.keys, cache.values = made
    cache.offset += 1
    setattr(cache, KNOWN, Known(cache))
    return y


def periods_of(rope: mlx_nn.Module, dims: int) -> mx.array | None:
    """float32 [dims / 2]: positions over these are the angles by which ``rope`` rotates.

    None where it rotates other dims than all, or other pairs than d and d + dims / 2.
    """
    if rope.dims != dims or rope.traditional:
        return None
    if type(rope) is mlx_nn.RoPE:
        return _periods(dims, rope.base, rope.scale)
    freqs = rope.get("_freqs")  # Llama3RoPE's
    return freqs if isinstance(freqs, mx.array) and freqs.dtype == mx.float32 else None


@functools.cache
def _periods(dims: int, base: float, scale: float) -> mx.array:
    return mx.array([base ** (d / dims) / scale for d in range(0, dims, 2)], mx.float32)
