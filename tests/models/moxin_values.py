"""Moxin-7B VLM put together from transformers' classes, and the same weights as published."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
from layer_values import decoded
from mlx_lowbit.models import moxin_vlm

DINO = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3}
DINO |= {"num_attention_heads": 3, "num_register_tokens": 4, "patch_size": 14}
# As in the published tower, no group size divides the width of the feed-forward part.
SIGLIP = {"hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 4}
SIGLIP |= {"num_attention_heads": 2, "patch_size": 14}
TEXT = {
    "model_type": "mistral",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "sliding_window": None,
}
IMAGE, PAD = 42, 150  # 9 patches
CONFIG = {
    "model_type": "prismatic",
    "vision_backbone_config": {"featurizer": DINO, "fused_featurizer": SIGLIP},
    "image_sizes": [IMAGE, IMAGE],
    "image_resize_strategy": "resize-naive",
    "pad_token_id": PAD,
    "text_config": TEXT,
}


class Composite:
    """torch's model: ``dino``, ``siglip``, ``projector``, ``mistral``, all in float32.

    Args:
        text: changes of the language model's configuration.
        gelu: the activation of both towers and the projector.
    """

    def __init__(self, text: dict[str, Any] | None = None, gelu: str = "gelu", seed: int = 0):
        import torch
        import transformers as tf

        text = {**TEXT, **(text or {})}
        eager = {"attn_implementation": "eager"}
        self.text = text
        self.dino = tf.Dinov2WithRegistersModel(
            tf.Dinov2WithRegistersConfig(
                **{k: v for k, v in DINO.items() if k != "intermediate_size"},
                mlp_ratio=DINO["intermediate_size"] // DINO["hidden_size"],
                image_size=IMAGE,
                hidden_act=gelu,
                **eager,
            )
        )
        self.siglip = tf.SiglipVisionModel(
            tf.SiglipVisionConfig(**SIGLIP, image_size=IMAGE, hidden_act=gelu, **eager)
        )
        theta = text.get("rope_theta", 10000.0)
        config = {k: v for k, v in text.items() if k not in ("model_type", "rope_theta")}
        self.mistral = tf.MistralForCausalLM(
            tf.MistralConfig(
                **config,
                rope_parameters={"rope_type": "default", "rope_theta": theta},
                pad_token_id=None,
                bos_token_id=1,
                eos_token_id=None,
                **eager,
            )
        )
        wide, own = DINO["hidden_size"] + SIGLIP["hidden_size"], text["hidden_size"]
        act = torch.nn.GELU(approximate="none" if gelu == "gelu" else "tanh")
        layers = [(wide, 4 * wide), (4 * wide, own), (own, own)]
        linears = [torch.nn.Linear(*dims) for dims in layers]
        self.projector = torch.nn.Sequential(linears[0], act, linears[1], act, linears[2])
        torch.manual_seed(seed)
        for part in self.parts():
            part.eval().requires_grad_(False)
            for name, value in part.state_dict().items():
                _randomize(name, value)
        # A published tower has no position for the class token: transformers adds zero there.
        self.dino.embeddings.position_embeddings[:, 0] = 0

    def parts(self) -> list[Any]:
        return [self.dino, self.siglip, self.projector, self.mistral]

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """pixels [B, 6, H, W] -> both towers' second-to-last layers, without prefix tokens."""
        import torch

        x = torch.from_numpy(pixels)
        with torch.no_grad():
            dino = self.dino(x[:, :3], output_hidden_states=True).hidden_states[-2]
            siglip = self.siglip(x[:, 3:], output_hidden_states=True).hidden_states[-2]
        first = 1 + DINO["num_register_tokens"]
        return torch.cat([dino[:, first:], siglip], dim=-1).numpy()

    def embeddings(self, text: np.ndarray, pixels: np.ndarray | None) -> Any:
        """text [1, L], without a place for the image -> [1, L + patches, hidden]."""
        import torch

        with torch.no_grad():
            rows = self.mistral.model.embed_tokens(torch.from_numpy(text))
            if pixels is None:
                return rows
            image = self.projector(torch.from_numpy(self.features(pixels)))
            return torch.cat([rows[:, :1], image, rows[:, 1:]], dim=1)

    def logits(self, text: np.ndarray, pixels: np.ndarray | None = None) -> np.ndarray:
        """[1, all tokens, vocab_size]."""
        import torch

        with torch.no_grad():
            return self.mistral(inputs_embeds=self.embeddings(text, pixels)).logits.numpy()

    def greedy(self, text: np.ndarray, pixels: np.ndarray | None, count: int) -> list[int]:
        """The likeliest tokens that follow, one by one, by transformers' own generation."""
        import torch

        rows = self.embeddings(text, pixels)
        mask = torch.ones(rows.shape[:2], dtype=torch.long)
        made = self.mistral.generate(
            inputs_embeds=rows,
            attention_mask=mask,
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
        )
        return made[0].tolist()

    def published(self) -> dict[str, mx.array]:
        """All weights under the names of the converted checkpoint, unused ones too."""
        named = dict(_dino(self.dino.state_dict()))
        named |= dict(_siglip(self.siglip.state_dict()))
        for layer, (name, value) in enumerate(self.projector.state_dict().items()):
            named[f"projector.fc{layer // 2 + 1}.{name.partition('.')[2]}"] = value
        for name, value in self.mistral.state_dict().items():
            named[f"language_model.{name}"] = value
        return {name: mx.array(value.numpy()) for name, value in named.items()}

    def take(self, model: mlx_nn.Module) -> Composite:
        """Takes over what the quantized layers of `model` stand for."""
        import torch

        own = self.mistral.state_dict()
        for path, layer in model.named_modules():
            if "scales" in layer:
                name = path.removeprefix("language_model.") + ".weight"
                own[name].copy_(torch.from_numpy(decoded(layer).astype(np.float32)))
        return self


def _randomize(name: str, value: Any) -> None:
    import torch

    if not value.is_floating_point():
        return
    if value.ndim == 1:
        one = name.endswith(("weight", "lambda1"))
        value.copy_(torch.randn(value.shape) * 0.1 + int(one))
    elif any(each in name for each in ("token", "position", "probe")):
        value.copy_(torch.randn(value.shape) * 0.5)
    else:
        value.copy_(torch.randn(value.shape) / value[0].numel() ** 0.5)


def _block(prefix: str, own: dict[str, Any], names: dict[str, str]) -> Iterator[tuple[str, Any]]:
    import torch

    for last in ("weight", "bias"):
        parts = [own[f"{names['attn']}.{part}_proj.{last}"] for part in "qkv"]
        yield f"{prefix}.attn.qkv.{last}", torch.cat(parts)
        for ours, theirs in names.items():
            if ours not in ("attn", "ls1", "ls2"):
                yield f"{prefix}.{ours}.{last}", own[f"{theirs}.{last}"]


def _dino(own: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    prefix = "vision_backbone.featurizer"
    first = "embeddings.patch_embeddings.projection"
    yield f"{prefix}.cls_token", own["embeddings.cls_token"]
    yield f"{prefix}.reg_token", own["embeddings.register_tokens"]
    yield f"{prefix}.pos_embed", own["embeddings.position_embeddings"][:, 1:]
    for last in ("weight", "bias"):
        yield f"{prefix}.patch_embed.proj.{last}", own[f"{first}.{last}"]
        yield f"{prefix}.norm.{last}", own[f"layernorm.{last}"]
    for index in range(DINO["num_hidden_layers"]):
        layer, block = f"encoder.layer.{index}", f"{prefix}.blocks.{index}"
        names = {"norm1": f"{layer}.norm1", "norm2": f"{layer}.norm2"}
        names |= {"attn": f"{layer}.attention", "attn.proj": f"{layer}.attention.o_proj"}
        names |= {f"mlp.fc{n}": f"{layer}.mlp.fc{n}" for n in (1, 2)}
        yield from _block(block, own, names)
        for n in (1, 2):
            yield f"{block}.ls{n}.scale_factor", own[f"{layer}.layer_scale{n}.lambda1"]


def _siglip(own: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    prefix = "vision_backbone.fused_featurizer"
    own = {name.removeprefix("vision_model."): value for name, value in own.items()}
    yield f"{prefix}.pos_embed", own["embeddings.position_embedding.weight"][None]
    yield f"{prefix}.attn_pool.latent", own["head.probe"]
    yield f"{prefix}.attn_pool.mlp.fc1.weight", own["head.mlp.fc1.weight"]
    for last in ("weight", "bias"):
        yield f"{prefix}.patch_embed.proj.{last}", own[f"embeddings.patch_embedding.{last}"]
        yield f"{prefix}.norm.{last}", own[f"post_layernorm.{last}"]
    for index in range(SIGLIP["num_hidden_layers"]):
        layer = f"encoder.layers.{index}"
        names = {f"norm{n}": f"{layer}.layer_norm{n}" for n in (1, 2)}
        names |= {"attn": f"{layer}.self_attn", "attn.proj": f"{layer}.self_attn.out_proj"}
        names |= {f"mlp.fc{n}": f"{layer}.mlp.fc{n}" for n in (1, 2)}
        yield from _block(f"{prefix}.blocks.{index}", own, names)


def load(
    weights: dict[str, mx.array], text: dict[str, Any] | None = None, fmt: dict | None = None
) -> moxin_vlm.Model:
    """Our model with `weights`, quantized where they are, as a loader would make it.

    Args:
        text: changes of the language model's configuration; None as a value leaves a key out.
        fmt: group_size, bits and mode of what is quantized.
    """
    own = {**TEXT, **(text or {})}
    args = moxin_vlm.ModelArgs.from_dict({**CONFIG, "text_config": own})
    model = moxin_vlm.Model(args)
    weights = model.sanitize(weights)
    if fmt is not None:
        mlx_nn.quantize(model, **fmt, class_predicate=lambda path, _: f"{path}.scales" in weights)
    model.load_weights([*weights.items()], strict=True)
    mx.eval(model.parameters())
    return model.eval()


def quantize(model: moxin_vlm.Model, **fmt: Any) -> moxin_vlm.Model:
    """`model` with what may be quantized quantized."""
    mlx_nn.quantize(
        model,
        **fmt,
        class_predicate=lambda path, layer: (
            hasattr(layer, "to_quantized") and model.quant_predicate(path, layer)
        ),
    )
    return model


def inputs(text: np.ndarray, image: bool = True) -> mx.array:
    """The tokens [1, L] for our model, with the image's place."""
    count = (IMAGE // DINO["patch_size"]) ** 2 if image else 0
    place = np.full((1, count), PAD)
    return mx.array(np.concatenate([text[:, :1], place, text[:, 1:]], axis=1))


# --- other layouts of the same weights ------------------------------------------------------------


def native(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The layout of the training code."""
    renamed = {}
    for name, value in weights.items():
        name = name.replace("language_model.", "llm_backbone.llm.")
        name = name.replace("vision_backbone.featurizer", "vision_backbone.dino_featurizer")
        name = name.replace("vision_backbone.fused_featurizer", "vision_backbone.siglip_featurizer")
        name = name.replace(".scale_factor", ".gamma")
        for layer in (1, 2, 3):
            name = name.replace(f"projector.fc{layer}", f"projector.projector.{2 * layer - 2}")
        renamed[f"model.{name}"] = value
    return renamed


def ominix(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """OminiX's layout: layers within layers, towers with q, k and v apart, channels last."""
    renamed = {}
    for name, value in weights.items():
        name = name.replace("fused_featurizer.", "featurizer.1.")
        name = name.replace("vision_backbone.featurizer.", "vision_backbone.featurizer.0.")
        name = name.replace("featurizer.0.1.", "featurizer.1.").replace("scale_factor", "gamma")
        name = name.replace("reg_token", "reg_tokens").replace(".attn.proj.", ".attn.out_proj.")
        if name.endswith("patch_embed.proj.weight"):
            value = value.transpose(0, 2, 3, 1)
        if f"{name.removesuffix('.weight')}.scales" in weights:
            name = name.replace(".weight", ".inner.weight")
        if ".attn.qkv." in name:
            for part, own in zip("qkv", mx.split(value, 3), strict=True):
                renamed[name.replace("qkv", f"{part}_proj")] = own
        else:
            renamed[name] = value
    return renamed
