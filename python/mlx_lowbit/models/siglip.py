"""SigLIP's vision tower for features: timm's ``vit_so400m_patch14_siglip_224``.

The features are those of the second-to-last block, so the last block, the final norm and the
pooling head have no part here. Parameter names and shapes are those of the published checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .dinov2 import MLP, Attention, PatchEmbed, check_sizes


@dataclass
class ModelArgs:
    """A tower's sizes; the defaults are those of ViT-SO400M/14.

    Attributes:
        num_hidden_layers: blocks of the published tower, of which all but the last run.
        image_size: pixels in height and in width; a multiple of patch_size.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
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


class Block(nn.Module):
    """Attention and a feed-forward part, each added to what went in."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        dims, eps = args.hidden_size, args.layer_norm_eps
        self.norm1 = nn.LayerNorm(dims, eps=eps)
        self.attn = Attention(dims, args.num_attention_heads)
        self.norm2 = nn.LayerNorm(dims, eps=eps)
        self.mlp = MLP(dims, args.intermediate_size)

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, L, dims] -> [B, L, dims]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """The tower up to its second-to-last block."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.patch_embed = PatchEmbed(args)
        self.pos_embed = mx.zeros((1, args.num_patches, args.hidden_size))
        self.blocks = [Block(args) for _ in range(args.num_hidden_layers - 1)]

    def __call__(self, pixels: mx.array) -> mx.array:
        """pixels [B, 3, H, W] -> features of the patches [B, patches, hidden].

        Raises:
            ValueError: an image of another shape.
        """
        x = self.patch_embed(pixels) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return x
