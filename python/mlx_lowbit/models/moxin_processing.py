"""What Moxin-7B VLM reads: an image as pixels for two towers, a question as tokens.

Pixels are those of the published processor (torchvision's transforms on a Pillow image): one resize
for each tower with Pillow's own antialiasing, a crop in the middle, values in 0..1, then normalized
with the tower's mean and deviation. Pillow is imported where an image is touched.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from .moxin_vlm import ModelArgs

# (mean, standard deviation) of each tower, from timm.
STATISTICS = (
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
)
BICUBIC = 3  # Pillow's number for it, and that of the published files
_IMAGE_MARK = "<image>"
_MOST_PIXELS = 1 << 27  # of an image on the way, which a thin one can exceed


# --- images -------------------------------------------------------------------------------------


def open_image(path: str | Path) -> Image.Image:
    """The image in a file, in RGB and upright (as its EXIF orientation says).

    Raises:
        OSError: a file that cannot be read.
        ValueError: a file that is no image, or a damaged one.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError:
        raise ImportError("images need Pillow: pip install 'mlx-lowbit[vlm]'") from None
    try:
        with warnings.catch_warnings():
            # Of large images; the largest are refused.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image.load()
                return to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image of a kind that Pillow reads") from None
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    # What Pillow's readers raise for damaged files is not limited to one class.
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as an image: {error}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """`image` in RGB with 8 bits; transparency is dropped, 16-bit gray keeps its upper bits."""
    from PIL import Image

    if image.mode.startswith("I"):
        gray = np.asarray(image).astype(np.int64)
        gray = gray >> 8 if image.mode != "I" or gray.max(initial=0) > 255 else gray
        image = Image.fromarray(gray.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


@dataclass(frozen=True)
class TowerPixels:
    """How one tower's pixels are made.

    Attributes:
        resize: (height, width), or one number for the shorter side.
        crop: (height, width) from the middle.
        mean, std: of values in 0..1, for each channel.
        interpolation: Pillow's number.
        fill: color for a border that makes the image square first; None for no border.
    """

    resize: tuple[int, int] | int
    crop: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: int = BICUBIC
    fill: tuple[int, int, int] | None = None

    def __call__(self, image: Image.Image) -> np.ndarray:
        """`image` in RGB -> float32 [3, height, width] of the crop."""
        image = image if self.fill is None else letterbox(image, self.fill)
        image = crop_middle(resize(image, self.resize, self.interpolation), self.crop)
        values = np.asarray(image, np.float32).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.array(each, np.float32)[:, None, None] for each in (self.mean, self.std))
        return (values - mean) / std


def letterbox(image: Image.Image, fill: tuple[int, int, int]) -> Image.Image:
    """`image` in the middle of a square; a row or column short of it where the rest is odd."""
    from PIL import Image

    width, height = image.size
    across, down = (max(image.size) - width) // 2, (max(image.size) - height) // 2
    _check_area(image, width + 2 * across, height + 2 * down)
    square = Image.new("RGB", (width + 2 * across, height + 2 * down), fill)
    square.paste(image, (across, down))
    return square


def resize(image: Image.Image, size: tuple[int, int] | int, interpolation: int) -> Image.Image:
    """`image` in `size`: (height, width), or so many pixels on the shorter side."""
    width, height = image.size
    if isinstance(size, int):
        short, long = sorted((width, height))
        other = int(size * long / short)
        size = (other, size) if width <= height else (size, other)
        _check_area(image, *size)
    if (height, width) == tuple(size):
        return image
    return image.resize((size[1], size[0]), interpolation)


def _check_area(image: Image.Image, one: int, other: int) -> None:
    if one * other > _MOST_PIXELS:
        width, height = image.size
        raise ValueError(f"an image of {width} x {height} pixels is too thin for this model")


def crop_middle(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle (height, width) of `image`, which is at least as large."""
    top, left = (round((image.size[1 - i] - size[i]) / 2) for i in range(2))
    return image.crop((left, top, left + size[1], top + size[0]))


def tower_pixels(args: ModelArgs, saved: dict[str, Any] | None = None) -> list[TowerPixels]:
    """How each tower's pixels are made.

    Args:
        saved: ``preprocessor_config.json``, whose values come before those of `args`. Its
            ``tvf_normalize_params`` are taken as they are, rounded to bfloat16 or not.

    Raises:
        ValueError: a value in `saved` that does not fit, by name.
    """
    saved = saved or {}
    strategy = saved.get("image_resize_strategy", args.image_resize_strategy)
    towers = []
    for index, size in enumerate(args.image_sizes):
        normalize = _entry(saved, "tvf_normalize_params", index)
        mean, std = STATISTICS[index]
        mean = _three(normalize.get("mean", _item(saved, "means", index) or mean), "mean")
        std = _three(normalize.get("std", _item(saved, "stds", index) or std), "std")
        if min(std) <= 0:
            raise ValueError(f"tvf_normalize_params: std: expected positive numbers, got {std}")
        fill = None
        if strategy == "letterbox":
            fill = saved.get("tvf_letterbox_fill") or [int(each * 255) for each in mean]
            fill = tuple(int(each) for each in _three(fill, "tvf_letterbox_fill"))
        elif strategy not in ("resize-naive", "resize-crop"):
            raise ValueError(
                "image_resize_strategy: expected resize-naive, letterbox or resize-crop, "
                f"got {strategy!r}"
            )
        resizing = _entry(saved, "tvf_resize_params", index)
        target = resizing.get("size", (size, size) if strategy == "resize-naive" else size)
        crop = _entry(saved, "tvf_crop_params", index).get("output_size", (size, size))
        tower = TowerPixels(
            _pixels(target, "tvf_resize_params"),
            _pair(_pixels(crop, "tvf_crop_params")),
            mean,
            std,
            resizing.get("interpolation", BICUBIC),
            fill,
        )
        if tower.interpolation not in range(6):
            raise ValueError(
                f"tvf_resize_params: interpolation: expected 0 to 5, got {tower.interpolation!r}"
            )
        small = tower.resize if isinstance(tower.resize, int) else min(tower.resize)
        if tower.crop != (size, size) or small < size:
            raise ValueError(
                f"tower {index} reads {size} x {size} pixels, "
                f"not a crop {tower.crop} of {tower.resize}"
            )
        towers.append(tower)
    return towers


def _item(saved: dict[str, Any], name: str, index: int) -> Any:
    value = saved.get(name)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) <= index:
        raise ValueError(f"{name}: expected one for each of two towers, got {value!r}")
    return value[index]


def _entry(saved: dict[str, Any], name: str, index: int) -> dict[str, Any]:
    value = _item(saved, name, index)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}: expected objects, got {value!r}")
    return {k: v for k, v in (value or {}).items() if v is not None}


def _three(value: Any, name: str) -> tuple[float, float, float]:
    numbers = isinstance(value, (list, tuple)) and all(
        isinstance(each, (int, float)) and np.isfinite(each) for each in value
    )
    if not numbers or len(value) != 3:
        raise ValueError(f"{name}: expected three numbers, got {value!r}")
    return tuple(value)


def _pixels(value: Any, name: str) -> tuple[int, int] | int:
    values = value if isinstance(value, (list, tuple)) else [value]
    fits = all(isinstance(v, int) and not isinstance(v, bool) and 0 < v <= 1 << 14 for v in values)
    if not fits or len(values) not in (1, 2):
        raise ValueError(f"{name}: expected one or two sizes in pixels, got {value!r}")
    return values[0] if len(values) == 1 else tuple(values)


def _pair(size: tuple[int, int] | int) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


# --- prompts ------------------------------------------------------------------------------------


def build_prompt(question: str, history: Iterable[tuple[str, str]] = (), eos: str = "</s>") -> str:
    """The text for the tokenizer: ``In: ...\\nOut:`` for each question, answers ended by `eos`.

    Args:
        question: what is asked now; a literal ``<image>`` in it is dropped.
        history: (question, answer) of the turns before.

    Raises:
        ValueError: an empty question.
    """
    text = ""
    for asked, answer in history:
        text += f"In: {_clean(asked)}\nOut: {_clean(answer) or ' '}{eos}"
    if not (question := _clean(question)):
        raise ValueError("question: expected some text, got none")
    return f"{text}In: {question}\nOut:"


def _clean(text: str) -> str:
    return text.replace(_IMAGE_MARK, "").strip()


def splice(tokens: Sequence[int], count: int, placeholder: int) -> list[int]:
    """`tokens` with `count` times `placeholder` after the first, where an image's embeddings go."""
    return [*tokens[:1], *[placeholder] * count, *tokens[1:]]


class Inputs(NamedTuple):
    """What a prompt is for the model: ``Model.embed_inputs(mx.array(tokens), pixel_values=...)``.

    Attributes:
        tokens: ids, with pad_token_id in the place of the image's embeddings.
        pixel_values: float32 [1, 6, H, W], or None without an image.
    """

    tokens: list[int]
    pixel_values: np.ndarray | None


class Processor:
    """Makes a model's inputs from an image and a question.

    Args:
        args: the model's configuration.
        tokenizer: with ``encode``, as transformers' and mlx-lm's; kept as ``tokenizer``.
        saved: ``preprocessor_config.json``.

    Raises:
        ValueError: a value in `saved` that does not fit, by name.
    """

    def __init__(
        self, args: ModelArgs, tokenizer: Any, saved: dict[str, Any] | None = None
    ) -> None:
        self.args, self.tokenizer, self.saved = args, tokenizer, saved
        self.towers = tower_pixels(args, saved)

    @classmethod
    def from_directory(cls, directory: str | Path, args: ModelArgs, tokenizer: Any) -> Processor:
        """With the ``preprocessor_config.json`` of `directory`, if it is there.

        Raises:
            ValueError: a file that does not fit, by name.
        """
        file, saved = Path(directory) / "preprocessor_config.json", None
        if file.is_file():
            try:
                saved = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{file}: not JSON: {error}") from None
            if not isinstance(saved, dict):
                raise ValueError(f"{file}: expected an object, got {saved!r}")
        try:
            return cls(args, tokenizer, saved)
        except ValueError as error:
            raise ValueError(f"{file}: {error}" if saved else str(error)) from None

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer's files, and ``preprocessor_config.json`` as it was read."""
        self.tokenizer.save_pretrained(str(directory))
        if self.saved is not None:
            text = json.dumps(self.saved, indent=2, sort_keys=True) + "\n"
            (Path(directory) / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def pixels(self, image: Image.Image | str | Path) -> np.ndarray:
        """`image` (a path: :func:`open_image`) -> float32 [1, 6, H, W], DINOv2's channels first.

        Raises:
            OSError, ValueError: as :func:`open_image`, an image without pixels, or one so thin that
                making it square takes too much memory.
            TypeError: neither an image nor a path.
        """
        from PIL import Image

        if isinstance(image, (str, Path)):
            image = open_image(image)
        elif not isinstance(image, Image.Image):
            raise TypeError(f"image: expected Pillow's or a path, got {type(image).__name__}")
        if 0 in image.size:
            raise ValueError("image: expected some pixels, got none")
        image = to_rgb(image)
        return np.concatenate([tower(image) for tower in self.towers])[None]

    def tokens(self, question: str, history: Iterable[tuple[str, str]] = ()) -> list[int]:
        """The ids of :func:`build_prompt`, which the token for the beginning of a text precedes.

        Raises:
            ValueError: an empty question, or a tokenizer of another model.
        """
        eos = getattr(self.tokenizer, "eos_token", None) or "</s>"
        tokens = [int(t) for t in self.tokenizer.encode(build_prompt(question, history, eos))]
        bos = getattr(self.tokenizer, "bos_token_id", None)
        bos = self.args.text.bos_token_id if bos is None else bos
        if tokens[:1] != [bos]:
            tokens.insert(0, bos)
        if max(tokens) >= self.args.vocab_size:
            raise ValueError(
                f"the tokenizer is another model's: it gives the id {max(tokens)}, and the model "
                f"has {self.args.vocab_size}"
            )
        return tokens

    def __call__(
        self,
        question: str,
        image: Image.Image | str | Path | None = None,
        history: Iterable[tuple[str, str]] = (),
    ) -> Inputs:
        """The model's inputs for `question` about `image`, after `history`.

        Raises:
            OSError: an image file that cannot be read.
            ValueError: no image, an empty question, a tokenizer of another model, or a prompt that
                does not fit into the model's context.
        """
        tokens, pixels = self.tokens(question, history), None
        if self.args.pad_token_id in tokens:
            raise ValueError(
                f"the prompt contains the token {self.args.pad_token_id}, which is the image's"
            )
        if image is not None:
            tokens = splice(tokens, self.args.num_image_tokens, self.args.pad_token_id)
        if len(tokens) > (limit := self.args.max_position_embeddings):
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, and this model has positions for {limit}"
            )
        if image is not None:
            pixels = self.pixels(image)
        return Inputs(tokens, pixels)
