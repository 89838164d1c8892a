"""DINOv2 with registers, as a tower for features: timm's ``vit_large_patch14_reg4_dinov2``.

The features are those of the second-to-last block, so the last block, the final norm and any head
have no part here. Parameter names and shapes are those of the published checkpoints (timm's, with
``scale_factor`` for the ``gamma`` of a LayerScale).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .. import ops


@dataclass
class ModelArgs:
    """A tower's sizes; the defaults are those of ViT-L/14 with four registers.

    Attributes:
        num_hidden_layers: blocks of the published tower, of which all but the last run.
        image_size: pixels in height and in width; a multiple of patch_size.
    """

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_register_tokens: int = 4
    patch_size: int = 14
    image_size: int = 224
    layer_norm_eps: float = 1e-6

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """From the keys of `config` that are known.

        Raises:
            ValueError: a value that does not fit, by name.
        """
        names = {field.name for field in fields(cls)}
        return cls(**{k: v for k, v in config.items() if k in names and v is not None})

    def __post_init__(self) -> None:
        check_sizes(self)

    @property
    def num_patches(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch_size) ** 2


def check_sizes(args: Any) -> None:
    """Refuses sizes that no tower has.

    Raises:
        ValueError: a value that does not fit, by name.
    """
    for field in fields(args):
        value, least = getattr(args, field.name), int(field.name != "num_register_tokens")
        whole = field.type == "int"
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = "an integer" if whole else "a number"
            raise ValueError(f"{field.name}: expected {kind}, got {value!r}")
        if value < least if whole else not 0 < value < 1:
            raise ValueError(
                f"{field.name}: expected {'more' if whole else '0 < eps < 1'}, got {value}"
            )
    if args.num_hidden_layers < 2:
        raise ValueError(
            f"num_hidden_layers: features are of the second-to-last, got {args.num_hidden_layers}"
        )
    for large, small in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
        if getattr(args, large) % getattr(args, small):
            raise ValueError(
                f"{large}: expected a multiple of {small} {getattr(args, small)}, "
                f"got {getattr(args, large)}"
            )


class PatchProjection(nn.Module):
    """The weight of a convolution whose kernel and stride are a patch, in torch's layout.

    Holds ``weight`` [hidden, channels, patch, patch] and ``bias`` [hidden].
    """

    def __init__(self, hidden: int, patch: int, channels: int = 3) -> None:
        super().__init__()
        scale = (channels * patch * patch) ** -0.5
        self.weight = mx.random.uniform(-scale, scale, (hidden, channels, patch, patch))
        self.bias = mx.zeros((hidden,))

    def __call__(self, pixels: mx.array) -> mx.array:
        """pixels [B, channels, H, W] -> [B, patches, hidden], patches row by row."""
        hidden, channels, patch, _ = self.weight.shape
        b, _, height, width = pixels.shape
        rows, columns = height // patch, width // patch
        # One row for each patch, in the order of the kernel: channel, row, column.
        x = pixels.reshape(b, channels, rows, patch, columns, patch).transpose(0, 2, 4, 1, 3, 5)
        x = x.reshape(b, rows * columns, channels * patch * patch).astype(self.weight.dtype)
        return ops.linear(x, self.weight.reshape(hidden, -1), bias=self.bias)


class PatchEmbed(nn.Module):
    """Patches of an image as tokens."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.image_size = args.image_size
        self.proj = PatchProjection(args.hidden_size, args.patch_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        """pixels [B, 3, image_size, image_size] -> [B, patches, hidden].

        Raises:
            ValueError: an image of another shape.
        """
        shape = (3, self.image_size, self.image_size)
        if pixels.ndim != 4 or pixels.shape[1:] != shape:
            raise ValueError(f"pixels: expected [B, {shape}], got {list(pixels.shape)}")
        return self.proj(pixels)


def attend(q: mx.array, k: mx.array, v: mx.array, scale: float) -> mx.array:
    """Attention of every token to every token, [B, heads, L, dims] each, in the dtype of q.

    On a CPU by one product a head, in float32: MLX's own attention multiplies through a reference
    BLAS there. A block of ViT-L took 79 ms so on 2 cores with AMX, and takes 18 ms.
    """
    if mx.default_device().type != mx.cpu:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)
    shape, dtype = q.shape, q.dtype
    q, k, v = (x.astype(mx.float32).reshape(-1, *shape[2:]) for x in (q, k, v))
    weights = mx.stack([ops.linear(*pair) for pair in zip(q * scale, k, strict=True)])
    weights, columns = mx.softmax(weights, axis=-1), mx.contiguous(v.swapaxes(1, 2))
    y = mx.stack([ops.linear(*pair) for pair in zip(weights, columns, strict=True)])
    return y.reshape(shape).astype(dtype)


class Attention(nn.Module):
    """Attention among all tokens; one product for queries, keys and values."""

    def __init__(self, dims: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = (dims // heads) ** -0.5
        self.qkv = nn.Linear(dims, 3 * dims)
        self.proj = nn.Linear(dims, dims)

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, dims] -> [B, L, dims]."""
        b, length, dims = x.shape
        q, k, v = self.qkv(x).reshape(b, length, 3, self.heads, -1).transpose(2, 0, 3, 1, 4)
        y = attend(q, k, v, self.scale)
        return self.proj(y.transpose(0, 2, 1, 3).reshape(b, length, dims))


class MLP(nn.Module):
    """``fc2(gelu(fc1 x))`` with the exact GELU (erf): the tanh form gives other features."""

    def __init__(self, dims: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dims, hidden)
        self.fc2 = nn.Linear(hidden, dims)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., dims] -> [..., dims]."""
        return self.fc2(nn.gelu(self.fc1(x)))


class LayerScale(nn.Module):
    """A factor for each dimension."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.scale_factor = mx.ones((dims,))

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., dims] -> [..., dims]."""
        return x * self.scale_factor


class Block(nn.Module):
    """Attention and a feed-forward part, each scaled and added to what went in."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        dims, eps = args.hidden_size, args.layer_norm_eps
        self.norm1 = nn.LayerNorm(dims, eps=eps)
        self.attn = Attention(dims, args.num_attention_heads)
        self.ls1 = LayerScale(dims)
        self.norm2 = nn.LayerNorm(dims, eps=eps)
        self.mlp = MLP(dims, args.intermediate_size)
        self.ls2 = LayerScale(dims)

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, dims] -> [B, L, dims]."""
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Model(nn.Module):
    """The tower up to its second-to-last block."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.patch_embed = PatchEmbed(args)
        self.pos_embed = mx.zeros((1, args.num_patches, args.hidden_size))
        self.cls_token = mx.zeros((1, 1, args.hidden_size))
        self.reg_token = mx.zeros((1, args.num_register_tokens, args.hidden_size))
        self.blocks = [Block(args) for _ in range(args.num_hidden_layers - 1)]

    def __call__(self, pixels: mx.array) -> mx.array:
        """pixels [B, 3, H, W] -> features of the patches [B, patches, hidden].

        Raises:
            ValueError: an image of another shape.
        """
        # Positions are those of patches alone, and are added before the other tokens come.
        x = self.patch_embed(pixels) + self.pos_embed
        first = mx.concatenate([self.cls_token, self.reg_token], axis=1)
        first = mx.broadcast_to(first, (x.shape[0], *first.shape[1:]))
        x = mx.concatenate([first, x], axis=1)
        for block in self.blocks:
            x = block(x)
        return x[:, first.shape[1] :]
