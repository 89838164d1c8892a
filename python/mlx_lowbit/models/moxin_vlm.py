"""Moxin-7B VLM: model_type ``prismatic``.

An image goes through two towers, DINOv2 and SigLIP; their features, side by side, become embeddings
of the language model (Mistral), which reads them right after the token that begins the text.

Parameter names are those of the converted checkpoint (``vision_backbone.featurizer``,
``vision_backbone.fused_featurizer``, ``projector``, ``language_model``); :meth:`Model.sanitize`
takes the other published layouts. Of the vision towers, what no feature depends on is dropped: the
last block, the final norm, the pooling head.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import dinov2, mistral, siglip

if TYPE_CHECKING:
    from .moxin_processing import Processor

DINO_ID = "vit_large_patch14_reg4_dinov2.lvd142m"
SIGLIP_ID = "vit_so400m_patch14_siglip_224"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
RESIZE_STRATEGIES = ("resize-naive", "letterbox", "resize-crop")
# What the converter wrote over MistralConfig's defaults. A nested configuration is saved as its
# difference to them, so any of their keys may be absent; rms_norm_eps is 1e-6 then, as in the
# class that reads the published files, and a text_config that holds the key decides.
_TEXT = {"num_hidden_layers": 36, "vocab_size": 32064}
_TOWERS = (
    ("featurizer", dinov2.ModelArgs, DINO_ID),
    ("fused_featurizer", siglip.ModelArgs, SIGLIP_ID),
)


@dataclass
class ModelArgs:
    """``config.json``; what is missing or null has the value of Moxin-7B VLM.

    Attributes:
        text_config: the language model's configuration; ``text`` with everything filled in.
        image_resize_strategy: one of RESIZE_STRATEGIES.
        llm_max_length: tokens that the language model was trained to read, the image's included.
        pad_token_id: stands for the tokens of an image in a prompt; never read as text.
        vision_backbone_config: sizes other than the published towers', by ``featurizer`` and
            ``fused_featurizer``; the keys are those of the towers' own ModelArgs.
        featurizer, fused_featurizer, text: the parts, made from the above.
    """

    model_type: str = "prismatic"
    text_config: dict[str, Any] = field(default_factory=dict)
    arch_specifier: str = "no-align+fused-gelu-mlp"
    use_fused_vision_backbone: bool = True
    timm_model_ids: Sequence[str] = (DINO_ID, SIGLIP_ID)
    timm_override_act_layers: Sequence[str | None] = (None, None)
    image_sizes: Sequence[int] = (224, 224)
    image_resize_strategy: str = "resize-naive"
    llm_max_length: int = 2048
    pad_token_id: int = 32000
    vision_backbone_config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> ModelArgs:
        """From ``config.json``.

        Raises:
            ValueError: a value that does not fit, by name.
        """
        names = {each.name for each in fields(cls)}
        return cls(**{k: v for k, v in config.items() if k in names and v is not None})

    def __post_init__(self) -> None:
        for name in ("text_config", "vision_backbone_config"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name}: expected an object, got {getattr(self, name)!r}")
        for name in ("timm_model_ids", "timm_override_act_layers", "image_sizes"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or len(value) != 2:
                raise ValueError(f"{name}: expected one for each of two towers, got {value!r}")
        if self.use_fused_vision_backbone is not True:
            raise ValueError("use_fused_vision_backbone: expected true, DINOv2 and SigLIP together")
        if not str(self.arch_specifier).endswith("fused-gelu-mlp"):
            raise ValueError(
                f"arch_specifier: expected one with 'fused-gelu-mlp', got {self.arch_specifier!r}"
            )
        if any(act is not None for act in self.timm_override_act_layers):
            raise ValueError(
                f"timm_override_act_layers: expected none, got {self.timm_override_act_layers!r}"
            )
        if self.image_resize_strategy not in RESIZE_STRATEGIES:
            raise ValueError(
                f"image_resize_strategy: expected one of {', '.join(RESIZE_STRATEGIES)}, "
                f"got {self.image_resize_strategy!r}"
            )
        self.featurizer, self.fused_featurizer = map(self._tower, range(len(_TOWERS)))
        patches = self.featurizer.num_patches, self.fused_featurizer.num_patches
        if patches[0] != patches[1]:
            raise ValueError(f"image_sizes: the towers make {patches[0]} and {patches[1]} patches")
        self.text = self._text()
        for name, limit in (("pad_token_id", self.text.vocab_size), ("llm_max_length", None)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
            if limit is not None and value >= limit:
                raise ValueError(f"{name}: expected less than vocab_size {limit}, got {value}")

    def _tower(self, index: int) -> Any:
        name, args, known = _TOWERS[index]
        given = self.vision_backbone_config.get(name)
        if given is None and self.timm_model_ids[index] != known:
            raise ValueError(
                f"timm_model_ids: expected {known!r} in place {index}, "
                f"got {self.timm_model_ids[index]!r}"
            )
        if given is not None and not isinstance(given, dict):
            raise ValueError(f"vision_backbone_config: {name}: expected an object, got {given!r}")
        try:
            return args.from_dict({**(given or {}), "image_size": self.image_sizes[index]})
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _text(self) -> mistral.ModelArgs:
        kind = self.text_config.get("model_type", "mistral")
        if kind != "mistral":
            raise ValueError(f"text_config: expected model_type 'mistral', got {kind!r}")
        try:
            given = {k: v for k, v in self.text_config.items() if k not in _TEXT or v is not None}
            return mistral.ModelArgs.from_dict({**_TEXT, **given})
        except ValueError as error:
            raise ValueError(f"text_config: {error}") from None

    @property
    def num_image_tokens(self) -> int:
        """Embeddings that the language model reads for an image."""
        return self.featurizer.num_patches

    @property
    def max_position_embeddings(self) -> int:
        """The longest prompt, the image's tokens included."""
        return min(self.llm_max_length, self.text.max_position_embeddings)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.text.vocab_size


class VisionBackbone(nn.Module):
    """Both towers on the same image, their features side by side."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.featurizer = dinov2.Model(args.featurizer)
        self.fused_featurizer = siglip.Model(args.fused_featurizer)

    def __call__(self, pixels: mx.array) -> mx.array:
        """pixels [B, 6, H, W], DINOv2's three channels first -> [B, patches, both hidden sizes].

        Raises:
            ValueError: an image of another shape.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 6:
            raise ValueError(f"pixels: expected [B, 6, H, W], got {list(pixels.shape)}")
        towers = self.featurizer(pixels[:, :3]), self.fused_featurizer(pixels[:, 3:])
        return mx.concatenate(towers, axis=-1)


class Projector(nn.Module):
    """Three layers from features to embeddings, with the exact GELU (erf) between them."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, 4 * features)
        self.fc2 = nn.Linear(4 * features, hidden)
        self.fc3 = nn.Linear(hidden, hidden)

    def __call__(self, x: mx.array) -> mx.array:
        """x [..., features] -> [..., hidden]."""
        return self.fc3(nn.gelu(self.fc2(nn.gelu(self.fc1(x)))))


class Model(nn.Module):
    """Towers, projector and language model, in mlx-lm's protocol."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.vision_backbone = VisionBackbone(args)
        features = args.featurizer.hidden_size + args.fused_featurizer.hidden_size
        self.projector = Projector(features, args.text.hidden_size)
        self.language_model = mistral.Model(args.text)

    def encode_image(self, pixels: mx.array) -> mx.array:
        """pixels [B, 6, H, W] -> embeddings [B, patches, hidden].

        Raises:
            ValueError: an image of another shape.
        """
        return self.projector(self.vision_backbone(pixels))

    def embed_inputs(self, inputs: mx.array, *, pixel_values: Any = None) -> mx.array:
        """What the language model reads for a prompt, with an image's embeddings in their place.

        Args:
            inputs: integers [L] or [B, L]; with an image, ``num_image_tokens`` times pad_token_id
                from position 1 on (``moxin_processing.splice``).
            pixel_values: None, or the image [1, 6, H, W], [B, 6, H, W] for as many prompts.

        Returns:
            [L, hidden] or [B, L, hidden], in the dtype of the embedding.

        Raises:
            ValueError: an image of another shape, or no place for it in the prompt.
        """
        rows = inputs[None] if inputs.ndim == 1 else inputs
        x = self.language_model.model.embed_tokens(rows)
        if pixel_values is not None:
            count, pad = self.args.num_image_tokens, self.args.pad_token_id
            places = np.array(rows) == pad
            if places.shape[1] <= count or not places[:, 1 : 1 + count].all() or places[:, 0].any():
                raise ValueError(
                    f"inputs: expected {count} times pad_token_id {pad} after the first token, "
                    f"for the image; got {int(places.sum())} in {list(rows.shape)}"
                )
            pixels = mx.array(pixel_values)
            if pixels.shape[0] != rows.shape[0]:
                raise ValueError(
                    f"pixel_values: expected {rows.shape[0]} images, got {pixels.shape[0]}"
                )
            image = self.encode_image(pixels).astype(x.dtype)
            x = mx.concatenate([x[:, :1], image, x[:, 1 + count :]], axis=1)
        return x[0] if inputs.ndim == 1 else x

    def __call__(
        self,
        inputs: mx.array | None,
        cache: Sequence[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Logits [B, L, vocab_size].

        Args:
            inputs: integers [B, L]; not read where input_embeddings are given.
            cache: one of mlx-lm's caches for each layer.
            input_embeddings: [B, L, hidden] of :meth:`embed_inputs`.
        """
        return self.language_model(inputs, cache, input_embeddings)

    @property
    def layers(self) -> list[nn.Module]:
        """The language model's blocks, one cache each."""
        return self.language_model.layers

    def quant_predicate(self, path: str, module: nn.Module) -> bool:
        """Whether a module may be quantized: the language model's linear layers and its head.

        Towers, projector and embedding stay as they are (SigLIP's 4304 inputs are no multiple of
        most group sizes).
        """
        return path.startswith("language_model.") and isinstance(module, nn.Linear)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Tensors of any published layout, under the names of this model.

        The converted layout; the prefixes of the training code (``llm_backbone.llm``,
        ``vision_backbone.dino_featurizer`` or ``.featurizer.0``, ``projector.0``), timm's names
        (``ls1.gamma``), and those of OminiX's quantized files (``q_proj.inner.weight``, a tower's
        q, k and v apart, its convolution with channels last).
        """
        kept: dict[str, mx.array] = {}
        parts: dict[str, dict[str, mx.array]] = {}
        for name, value in weights.items():
            for pattern, own in _RENAMED:
                name = pattern.sub(own, name)
            if self._is_unused(name):
                continue
            if (part := _QKV.fullmatch(name)) is not None:
                parts.setdefault(f"{part[1]}.qkv.{part[3]}", {})[part[2]] = value
            elif name.endswith(".patch_embed.proj.weight"):
                kept[name] = _channels_first(value)
            else:
                kept[name] = value
        for name, own in parts.items():
            if own.keys() == {"q", "k", "v"}:
                kept[name] = mx.concatenate([own["q"], own["k"], own["v"]])
            else:  # for the loader to name
                prefix, _, last = name.rpartition(".qkv.")
                kept.update({f"{prefix}.{part}_proj.{last}": value for part, value in own.items()})
        text = {k: kept.pop(k) for k in [*kept] if k.startswith("language_model.")}
        text = {k.removeprefix("language_model."): v for k, v in text.items()}
        text = self.language_model.sanitize(text)
        return {**kept, **{f"language_model.{k}": v for k, v in text.items()}}

    def _is_unused(self, name: str) -> bool:
        """Whether `name` is of a tower's part that no feature depends on."""
        part = _TOWER_PART.match(name)
        if part is None:
            return False
        last = getattr(self.args, part[1]).num_hidden_layers - 1
        return part[2] in ("norm", "attn_pool", "fc_norm", "head") or part[3] == str(last)


# In this order, each where it is found.
_RENAMED = tuple(
    (re.compile(pattern), own)
    for pattern, own in (
        (r"^model\.(?=vision_backbone\.|projector\.|llm_backbone\.|language_model\.)", ""),
        (r"^llm_backbone\.llm\.", "language_model."),
        (r"^vision_backbone\.(?:featurizer\.0|dino_featurizer)\.", "vision_backbone.featurizer."),
        (
            r"^vision_backbone\.(?:featurizer\.1|siglip_featurizer)\.",
            "vision_backbone.fused_featurizer.",
        ),
        (r"^projector\.projector\.", "projector."),
        (r"^projector\.0\.", "projector.fc1."),
        (r"^projector\.2\.", "projector.fc2."),
        (r"^projector\.4\.", "projector.fc3."),
        (r"(?<=_proj|_head)\.inner\.(?=weight$|bias$)", "."),
        (r"^(vision_backbone\..*\.ls[12])\.gamma$", r"\1.scale_factor"),
        (r"^(vision_backbone\..*\.attn)\.out_proj\.", r"\1.proj."),
        (r"^(vision_backbone\.[^.]*)\.reg(?:ister)?_tokens$", r"\1.reg_token"),
    )
)
_TOWER_PART = re.compile(
    r"vision_backbone\.(featurizer|fused_featurizer)\.([^.]+)(?:\.(\d+)(?=\.))?"
)
_QKV = re.compile(r"(vision_backbone\..*\.attn)\.([qkv])_proj\.([a-z]+)")


def _channels_first(weight: mx.array) -> mx.array:
    """A convolution's weight in torch's layout [out, in, height, width], of three channels."""
    if weight.ndim == 4 and weight.shape[1] != 3 and weight.shape[3] == 3:
        return weight.transpose(0, 3, 1, 2)
    return weight


def load_processor(directory: str | Path, config: dict[str, Any]) -> Processor:
    """What turns an image and a question into this model's inputs, with the tokenizer.

    Raises:
        FileNotFoundError: no tokenizer is there.
        ValueError: a file that cannot be read or does not fit, or a tokenizer with more tokens than
            the model.
    """
    from mlx_lm.tokenizer_utils import load
    from transformers import LlamaConfig

    from ..load import end_tokens
    from .moxin_processing import Processor

    directory, args = Path(directory), ModelArgs.from_dict(config)
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{directory}: no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    # A tokenizer of Llama's family; transformers itself does not know this model_type.
    options = {"local_files_only": True, "config": LlamaConfig()}
    try:
        tokenizer = load(directory, options, eos_token_ids=end_tokens(directory, config))
    # What the libraries below raise for damaged files is not limited to one class.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{directory}: the tokenizer cannot be read: {reason}") from error
    if (size := tokenizer.vocab_size) > args.vocab_size:
        raise ValueError(
            f"{directory}: the tokenizer has {size} tokens, the model {args.vocab_size}: that of "
            "another model?"
        )
    return Processor.from_directory(directory, args, tokenizer)
