"""One token's attention in a cache's own memory: against float64, whoever else holds that memory.

On a CPU, which has no such kernel, numpy stands in for it and writes in place as well.
"""

from __future__ import annotations

import copy

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
from mlx_lowbit import accelerate, backend, memory
from mlx_lowbit.nn import cache_step, step

cache_module = pytest.importorskip("mlx_lm.models.cache")
llama = pytest.importorskip("mlx_lm.models.llama")
B, H, D = 2, 2, 64
SCALE = D**-0.5
KERNEL = cache_step._ext.cache_step
BOUNDS = {mx.bfloat16: 2**-8, mx.float16: 2**-11, mx.float32: 1e-6}


def takes(keys, heads):
    """Whether the kernel takes these."""
    return keys.dtype != mx.float32 and keys.shape[3] in (64, 128)


def stand_in(keys, values, q, k, v, periods, offset, scale):
    """What the kernel does."""
    mx.eval(keys, values, q, k, v)
    if periods is not None:
        q, k = (rotated(wide(a), offset / wide(periods), a.dtype) for a in (q, k))
    for cache, row in ((keys, k), (values, v)):
        np.asarray(cache.view(mx.uint16))[:, :, offset] = np.array(row.view(mx.uint16))[:, :, 0]
    keys, values = (mx.as_strided(a, a.shape, offset=0) for a in (keys, values))
    mx.eval(keys, values)
    y = attention(*(wide(a) for a in (q, keys[:, :, : offset + 1], values[:, :, : offset + 1])))
    return mx.array(y.astype(np.float32)).astype(q.dtype), keys, values


@pytest.fixture(autouse=True)
def in_place(monkeypatch):
    """The tokens since that were written in place."""
    if mx.default_device().type == mx.gpu:
        assert backend.missing_kernel(mx.gpu) is None  # loads them, as a model's products do
    else:
        monkeypatch.setattr(cache_step._ext, "takes_cache_step", takes)
    kernel, made = KERNEL if mx.default_device().type == mx.gpu else stand_in, []

    def counted(*a):
        result = kernel(*a)
        made.extend(result[:1])
        return result

    monkeypatch.setattr(cache_step._ext, "cache_step", counted)
    return made


def attention(q, keys, values):
    """In float64; scaled by D ** -0.5."""
    share = q.shape[1] // keys.shape[1]
    keys, values = (np.repeat(each, share, axis=1) for each in (keys, values))
    scores = q @ keys.swapaxes(2, 3) * q.shape[3] ** -0.5
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights @ values / weights.sum(axis=-1, keepdims=True)


def rotated(x, angles, dtype):
    low, high = np.split(x, 2, axis=-1)
    c, s = np.cos(angles), np.sin(angles)
    both = np.concatenate([low * c - high * s, low * s + high * c], axis=-1)
    return mx.array(both.astype(np.float32)).astype(dtype)


class Sequence:
    """A cache, and beside it in float64 what should be in it."""

    def __init__(self, dtype=mx.bfloat16, share=4, dims=D, tokens=5, rope=None):
        self.cache, self.dtype, self.share, self.dims = cache_module.KVCache(), dtype, share, dims
        self.rope = rope
        mx.random.seed(7)
        k, v = (mx.random.normal((B, H, tokens, dims)).astype(dtype) for _ in range(2))
        mx.eval(self.cache.update_and_fetch(k, v))
        self.keys, self.values = wide(k), wide(v)

    def kept(self):
        """What of the keys is filled, and what should be in it."""
        keys = self.cache.keys[:, :, : self.cache.offset]
        mx.eval(keys, self.cache.values)
        return keys, self.keys

    def rows(self, seed):
        """As products of several rows leave them: parts of an array."""
        mx.random.seed(seed)
        heads = H * self.share, H, H
        x = mx.random.normal((B, sum(heads) * self.dims)).astype(self.dtype)
        parts = mx.split(x, [H * self.share * self.dims, H * (self.share + 1) * self.dims], axis=1)
        return [part.reshape(B, n, 1, self.dims) for part, n in zip(parts, heads, strict=True)]

    def attend(self, seed):
        """y of one more token, by the way that Step goes."""
        q, k, v = self.rows(seed)
        periods = None if self.rope is None else cache_step.periods_of(self.rope, self.dims)
        if cache_step.ready(self.cache, None):
            y = cache_step.attend(self.cache, q, k, v, periods, self.dims**-0.5)
            if y is not None:
                return y
        single = mx.float32  # MLX's own in narrower types need not keep the bound
        if self.rope is not None:
            offset = self.cache.offset
            q, k = (self.rope(a.astype(single), offset=offset).astype(a.dtype) for a in (q, k))
        arrays = q, *self.cache.update_and_fetch(k, v)
        cache_step.note(self.cache, q.shape[1])
        arrays = (a.astype(single) for a in arrays)
        y = mx.fast.scaled_dot_product_attention(*arrays, scale=self.dims**-0.5)
        return y.astype(self.dtype)

    def expect(self, seed):
        """The same in float64."""
        q, k, v = map(wide, self.rows(seed))
        if self.rope is not None:
            frequencies = self.rope.base ** -(np.arange(0, self.dims, 2) / self.dims)
            angles = self.keys.shape[2] * self.rope.scale * frequencies
            q, k = (wide(rotated(each, angles, self.dtype)) for each in (q, k))
        self.keys = np.concatenate([self.keys, k], axis=2)
        self.values = np.concatenate([self.values, v], axis=2)
        return attention(q, self.keys, self.values)

    def token(self, seed):
        check(self.attend(seed), self.expect(seed))


def wide(a):
    return np.array(a.astype(mx.float32)).astype(np.float64)


def check(y, expected):
    mx.eval(y)
    assert np.linalg.norm(wide(y) - expected) <= BOUNDS[y.dtype] * np.linalg.norm(expected)


@pytest.mark.parametrize("dims", [64, 128])
@pytest.mark.parametrize("share", [1, 4, 7])
def test_against_float64(dtype, share, dims, in_place):
    """Over the end of the cache's memory as well, which grows by 256 tokens."""
    sequence = Sequence(dtype, share, dims, tokens=250)
    for seed in range(12):
        sequence.token(seed)
        assert sequence.cache.offset == 251 + seed
    # Not the first, not the one that grows.
    assert len(in_place) == (10 if dtype != mx.float32 else 0)


@pytest.mark.parametrize(
    "rope", [mlx_nn.RoPE(D), mlx_nn.RoPE(D, base=5e5, scale=0.25)], ids=["plain", "scaled"]
)
def test_rotates(rope, in_place):
    sequence = Sequence(rope=rope, tokens=300)
    for seed in range(4):
        sequence.token(seed)
    assert len(in_place) == 3


def test_whose_rotation_it_is_not():
    assert cache_step.periods_of(mlx_nn.RoPE(D, traditional=True), D) is None
    assert cache_step.periods_of(mlx_nn.RoPE(D // 2), D) is None


def test_nothing_is_copied(in_place):
    sequence = Sequence(dims=128, tokens=20000)
    for seed in range(2):
        mx.eval(sequence.attend(seed))
    mx.synchronize()
    size, before = sequence.cache.keys.nbytes, memory.get_active_memory()
    memory.reset_peak_memory()
    held = []
    for seed in range(3):
        # What the encoder of a GPU that is behind holds.
        held += [sequence.attend(seed), sequence.cache.keys, sequence.cache.values]
        mx.eval(held)
    mx.synchronize()
    assert len(in_place) == 4
    if mx.default_device().type == mx.gpu:  # what stands in for the kernel has float64 of all
        assert memory.get_peak_memory() - before < size // 4


def test_copies_go_their_own_ways(in_place):
    first = Sequence()
    for seed in range(3):
        first.token(seed)
    second = copy.copy(first)
    second.cache = copy.deepcopy(first.cache)
    for seed in range(3, 6):
        first.token(seed)
        second.token(10 + seed)
    assert len(in_place) == 2 + 3 + 2


def test_states_given_back():
    """Each goes on as if the others had not, though all began in the same memory."""
    sequence, states = Sequence(), []
    for seed in range(4):
        sequence.token(seed)
        states.append((copy.deepcopy(sequence.cache.state), sequence.keys, sequence.values))
    for state, sequence.keys, sequence.values in states * 2:
        sequence.cache.state = copy.deepcopy(state)
        sequence.token(20)


def test_trimmed():
    sequence = Sequence()
    ys = [(sequence.attend(seed), sequence.expect(seed)) for seed in range(4)]
    keys, expected = sequence.kept()
    sequence.cache.trim(2)
    sequence.keys, sequence.values = (a[:, :, :-2] for a in (sequence.keys, sequence.values))
    for seed in (20, 21, 22):
        sequence.token(seed)
    for each in ys:
        check(*each)
    assert np.array_equal(wide(keys), expected)


def test_drafts():
    """Tokens that went in by other ways and are trimmed, but not from a copy."""
    sequence = Sequence()
    for seed in range(3):
        sequence.token(seed)
    x = mx.random.normal((B, H, 4, D)).astype(mx.bfloat16)
    mx.eval(sequence.cache.update_and_fetch(x, x))
    other = copy.deepcopy(sequence.cache)
    sequence.cache.trim(4)
    for seed in (20, 21):
        sequence.token(seed)
    assert np.array_equal(wide(other.keys[:, :, other.offset - 4 : other.offset]), wide(x))


def test_what_is_held_stays():
    sequence = Sequence()
    for seed in range(2):
        sequence.token(seed)
    keys, expected = sequence.kept()
    for seed in range(3):
        sequence.token(seed)
    assert np.array_equal(wide(keys), expected)


def test_without_an_evaluation_between():
    sequence = Sequence()
    ys = [sequence.attend(seed) for seed in range(5)]
    for seed, y in enumerate(ys):
        check(y, sequence.expect(seed))


def test_other_caches_are_left():
    for made in (cache_module.RotatingKVCache(max_size=8), cache_module.QuantizedKVCache(32, 8)):
        k = mx.random.normal((1, 2, 1, D)).astype(mx.bfloat16)
        made.update_and_fetch(k, k)
        cache_step.note(made, 2)
        assert not cache_step.ready(made, None)


def test_masks_are_left():
    sequence = Sequence()
    mx.eval(sequence.attend(0))
    assert not cache_step.ready(sequence.cache, mx.zeros((1, 7)))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"offset": 8}, r"offset must be from 0 to 7, got 8"),
        ({"offset": -1}, r"offset must be from 0 to 7, got -1"),
        ({"k": (B, H, 2, D)}, r"k must have shape \(2,2,1,64\), got \(2,2,2,64\)"),
        ({"v": (B, H + 1, 1, D)}, r"v must have shape \(2,2,1,64\), got \(2,3,1,64\)"),
        ({"q": (B + 1, 8, 1, D)}, r"q must have shape \(2,8,1,64\), got \(3,8,1,64\)"),
        ({"values": (B, H, 7, D)}, r"values must have shape \(2,2,8,64\), got \(2,2,7,64\)"),
        ({"keys": (H, 8, D)}, r"keys and q must have four dimensions"),
        ({"periods": (D,)}, r"periods must have shape \(32\), got \(64\)"),
    ],
)
def test_refused(change, message):
    shapes = {
        "keys": (B, H, 8, D), "values": (B, H, 8, D), "q": (B, 8, 1, D), "k": (B, H, 1, D),
        "v": (B, H, 1, D), "periods": (D // 2,), "offset": 3,
    } | change  # fmt: skip
    arrays = {name: mx.zeros(s) if isinstance(s, tuple) else s for name, s in shapes.items()}
    with pytest.raises(ValueError, match=rf"^\[cache_step\] {message}"):
        KERNEL(**arrays, scale=SCALE)


@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_model(batch, traditional, in_place, monkeypatch):
    parts, product = [], step._ext.fixed_product

    def counted(*a):
        parts.append(len(a[-1]))
        return product(*a)

    monkeypatch.setattr(step._ext, "fixed_product", counted)
    config = {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 160,
        "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_traditional": traditional,
    }  # fmt: skip

    def logits(**options):
        mx.random.seed(3)
        model = llama.Model(llama.ModelArgs.from_dict(config))
        model.set_dtype(mx.bfloat16)
        mlx_nn.quantize(model)
        mx.eval(model.parameters())
        accelerate(model, **options)
        cache = cache_module.make_prompt_cache(model)
        rows = [model(mx.arange(3 * batch).reshape(batch, 3), cache=cache)[:, -1]]
        for i in range(5):
            rows.append(model(mx.arange(batch)[:, None] + i, cache=cache)[:, -1])
            mx.eval(rows)
        assert all(hasattr(each, cache_step.KNOWN) for each in cache) == bool(in_place)
        rows.append(model(mx.arange(2 * batch).reshape(batch, 2), cache=cache)[:, -1])
        # MLX's own cache may write in place only where nobody else owns the arrays.
        assert not any(hasattr(each, cache_step.KNOWN) for each in cache)
        return wide(mx.stack(rows))

    expected = logits(merge=True, compile=False)
    assert not in_place
    got = logits(merge=True, compile=True)
    assert len(in_place) == 2 * 4
    # Queries, keys and values of a block are one product where the kernel rotates them.
    assert parts.count(3) >= 2 or traditional
    assert np.linalg.norm(got - expected) <= 2**-6 * np.linalg.norm(expected)
