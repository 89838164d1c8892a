"""What Moxin-7B VLM reads: pixels against torch's own resampling, prompts, files of any kind."""

from __future__ import annotations

import json
import warnings

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_lm")
pytest.importorskip("transformers")
pytest.importorskip("PIL")

import moxin_values as values
import tiny_tokenizer
import torch
from mlx_lowbit.models import moxin_processing as processing
from mlx_lowbit.models import moxin_vlm
from PIL import Image
from tokenizers.processors import TemplateProcessing

STRATEGIES = ("resize-naive", "letterbox", "resize-crop")
DINO, SIGLIP = processing.STATISTICS
SIZES = [(42, 42), (64, 64), (90, 60), (61, 97), (20, 133), (30, 17)]  # width, height
# The tiny tokenizer's ids, and one more for the image.
WORDS = {**values.TEXT, "vocab_size": tiny_tokenizer.VOCABULARY + 2}
CONFIG = {**values.CONFIG, "text_config": WORDS, "pad_token_id": tiny_tokenizer.VOCABULARY + 1}
BOS, EOS = (256 + tiny_tokenizer.SPECIAL.index(each) for each in ("<s>", "</s>"))


def arguments(**changes):
    return moxin_vlm.ModelArgs.from_dict({**CONFIG, **changes})


def processor(saved=None, tokenizer=None, **changes):
    tokenizer = tokenizer or tiny_tokenizer.wrapped()
    return processing.Processor(arguments(**changes), tokenizer, saved)


def drawn(size=(64, 48), seed=0):
    """Smooth colors with a few edges, another in each quarter."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]] / max(size)
    waves = [np.sin(6 * (a * x + b * y) + c) for a, b, c in rng.uniform(-2, 2, (3, 3))]
    pixels = np.stack(waves, -1) * 100 + 128
    pixels[size[1] // 2 :, size[0] // 3 :] *= 0.5
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


# --- pixels -------------------------------------------------------------------------------------


def resampled(pixels, height, width):
    """float [3, h, w] -> [3, height, width], bicubic with antialiasing, in torch."""
    keywords = {"mode": "bicubic", "antialias": True, "align_corners": False}
    out = torch.nn.functional.interpolate(pixels[None], size=(height, width), **keywords)
    return out[0].clamp(0, 255)


def expected(image, strategy, side, fills):
    """Both towers' values in 0..255, as the reference's transforms are described."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).double()
    towers = []
    for fill in fills:
        x = pixels
        if strategy == "letterbox":
            height, width = x.shape[1:]
            over = [(max(height, width) - each) // 2 for each in (height, width)]
            square = torch.tensor(fill).double()[:, None, None]
            square = square.repeat(1, height + 2 * over[0], width + 2 * over[1])
            square[:, over[0] : over[0] + height, over[1] : over[1] + width] = x
            x = square
        height, width = x.shape[1:]
        if strategy == "resize-naive":
            x = resampled(x, side, side)
        else:
            short = min(height, width)
            x = resampled(x, *(int(side * each / short) for each in (height, width)))
            top, left = (round((each - side) / 2) for each in x.shape[1:])
            x = x[:, top : top + side, left : left + side]
        towers.append(x)
    return torch.cat(towers).numpy()


def in_bytes(pixels):
    """The values in 0..255 that were normalized."""
    mean, std = (np.array(each).reshape(6, 1, 1) for each in zip(DINO, SIGLIP, strict=True))
    return (pixels[0].astype(np.float64) * std + mean) * 255


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_pixels(strategy, size):
    image = drawn(size)
    got = processor(image_resize_strategy=strategy).pixels(image)
    assert got.shape == (1, 6, 42, 42) and got.dtype == np.float32
    want = expected(image, strategy, 42, [(123, 116, 103), (127, 127, 127)])
    off = np.abs(in_bytes(got) - want)
    # Pillow rounds to bytes after either direction, with weights of 22 bits.
    assert off.max() < 1.8 and off.mean() < 0.5
    whole = in_bytes(got)
    np.testing.assert_allclose(whole, whole.round(), atol=1e-3)


def test_strategies_differ_where_an_image_is_not_square():
    image = drawn((90, 60))
    got = [processor(image_resize_strategy=each).pixels(image) for each in STRATEGIES]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(in_bytes(got[one]) - in_bytes(got[other])).max() > 30


def test_an_image_of_the_right_size_is_only_normalized():
    image = drawn((42, 42))
    bytes_ = np.array(image).transpose(2, 0, 1)
    for index, (mean, std) in enumerate((DINO, SIGLIP)):
        want = [(b / 255 - m) / s for b, m, s in zip(bytes_, mean, std, strict=True)]
        got = processor().pixels(image)[0, 3 * index : 3 * index + 3]
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_the_published_size():
    whole = processing.tower_pixels(moxin_vlm.ModelArgs.from_dict({}))
    assert [t.resize for t in whole] == [(224, 224)] * 2 == [t.crop for t in whole]
    assert whole[0](drawn((500, 333))).shape == (3, 224, 224)


def saved_file(strategy, **changes):
    """``preprocessor_config.json`` as the published processor writes it."""
    naive = strategy == "resize-naive"
    size = [42, 42] if naive else 42
    rounded = [0.484375, 0.455078125, 0.40625], [0.228515625, 0.2236328125, 0.224609375]
    return {
        "image_resize_strategy": strategy,
        "input_sizes": [[3, 42, 42], [3, 42, 42]],
        "interpolations": ["bicubic", "bicubic"],
        "means": [list(DINO[0]), list(SIGLIP[0])],
        "stds": [list(DINO[1]), list(SIGLIP[1])],
        "tvf_resize_params": [
            {"antialias": True, "interpolation": 3, "max_size": None, "size": size}
        ]
        * 2,
        "tvf_crop_params": [{"output_size": [42, 42]}] * 2,
        "tvf_normalize_params": [
            {"inplace": False, "mean": rounded[0], "std": rounded[1]},
            {"inplace": False, "mean": [0.5] * 3, "std": [0.5] * 3},
        ],
        "tvf_do_letterbox": strategy == "letterbox",
        "tvf_letterbox_fill": [127, 127, 127] if strategy == "letterbox" else None,
        **changes,
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_saved_settings_come_first(strategy):
    image, other = drawn((90, 60)), STRATEGIES[STRATEGIES.index(strategy) - 1]
    got = processor(saved_file(strategy), image_resize_strategy=other).pixels(image)
    # The published processor has one border for both towers.
    want = expected(image, strategy, 42, [(127, 127, 127)] * 2)
    mean = np.reshape([0.484375, 0.455078125, 0.40625], (3, 1, 1))
    std = np.reshape([0.228515625, 0.2236328125, 0.224609375], (3, 1, 1))
    off = np.abs((got[0, :3] * std + mean) * 255 - want[:3])
    assert off.max() < 1.8 and off.mean() < 0.5
    assert np.abs(in_bytes(got)[3:] - want[3:]).max() < 1.8
    assert np.abs(got[0, :3] - (want[:3] / 255 - mean) / std).max() < 0.04


def test_means_stand_in_for_missing_parameters():
    saved = {"means": [[0.1] * 3, [0.2] * 3], "stds": [[0.3] * 3, [0.4] * 3]}
    towers = processor(saved).towers
    assert [t.mean for t in towers] == [(0.1,) * 3, (0.2,) * 3]
    assert [t.std for t in towers] == [(0.3,) * 3, (0.4,) * 3]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_resize_strategy": "squash"}, "image_resize_strategy.*'squash'"),
        ({"tvf_normalize_params": [{"mean": [0.5]}] * 2}, "mean.*three numbers"),
        ({"tvf_normalize_params": [{"std": [0.5, 0, 0.5]}] * 2}, "std.*positive"),
        ({"tvf_normalize_params": [{"std": [0.5, float("nan"), 0.5]}] * 2}, "std.*three numbers"),
        ({"tvf_normalize_params": [{}]}, "tvf_normalize_params.*two towers"),
        ({"tvf_normalize_params": [3, 4]}, "tvf_normalize_params.*objects"),
        ({"tvf_resize_params": [{"size": "big"}] * 2}, "tvf_resize_params.*'big'"),
        ({"tvf_resize_params": [{"size": [40, 42]}] * 2}, "42 x 42"),
        ({"tvf_resize_params": [{"interpolation": "cubic"}] * 2}, "interpolation.*'cubic'"),
        ({"tvf_crop_params": [{"output_size": [224, 224]}] * 2}, "42 x 42.*224"),
    ],
)
def test_saved_settings_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        processor(saved_file("resize-naive", **change))


# --- files of images ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["png", "bmp", "tiff", "gif", "jpeg", "webp", "ppm"])
def test_kinds_of_files(kind, tmp_path):
    image, path = drawn(), tmp_path / f"image.{kind}"
    image.save(path)
    opened = processing.open_image(path)
    assert opened.mode == "RGB" and opened.size == image.size
    off = np.abs(np.array(opened).astype(int) - np.array(image))
    assert off.max() == 0 if kind in ("png", "bmp", "tiff", "ppm") else off.mean() < 8
    np.testing.assert_array_equal(processor().pixels(path), processor().pixels(opened))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_modes(mode, tmp_path):
    gray = drawn().convert("L")
    if mode in ("I;16", "I"):  # 16 bits, as in a PNG file
        wide = np.asarray(gray).astype(np.uint16) * 256 + 77
        image = Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32))
        assert image.mode == mode
    else:
        image = (gray if mode == "F" else drawn()).convert(mode)
    rgb = processing.to_rgb(image)
    assert rgb.mode == "RGB" and rgb.size == image.size
    if mode in ("L", "LA", "I;16", "I", "F"):
        np.testing.assert_array_equal(np.asarray(rgb), np.asarray(gray)[..., None].repeat(3, -1))
    if mode == "I;16":
        image.save(tmp_path / "deep.png")
        again = processing.open_image(tmp_path / "deep.png")
        np.testing.assert_array_equal(np.asarray(again), np.asarray(rgb))
    assert np.isfinite(processor().pixels(image)).all()


def test_an_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    drawn((64, 48)).save(tmp_path / "turned.png", exif=exif)
    opened = processing.open_image(tmp_path / "turned.png")
    want = drawn((64, 48)).transpose(Image.Transpose.ROTATE_270)
    np.testing.assert_array_equal(np.array(opened), np.array(want))


def test_files_that_are_no_images_are_refused(tmp_path):
    whole = tmp_path / "whole.png"
    drawn((200, 200)).save(whole)
    bad = {
        "text.png": b"not an image",
        "empty.jpg": b"",
        "cut.png": whole.read_bytes()[:-1500],
        "header.png": whole.read_bytes()[:20],
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*image"):
            processing.open_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing"):
        processing.open_image(tmp_path / "missing.png")
    with pytest.raises(IsADirectoryError):
        processing.open_image(tmp_path)


def test_an_image_too_large_to_decode_is_refused(tmp_path, monkeypatch):
    drawn().save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"large\.png.*decompression bomb"):
        processing.open_image(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # where Pillow warns only
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert processing.open_image(tmp_path / "large.png").size == drawn().size


@pytest.mark.parametrize("strategy", ["letterbox", "resize-crop"])
@pytest.mark.parametrize("size", [(100000, 1), (1, 100000)])
def test_an_image_too_thin_to_be_made_square_is_refused(strategy, size):
    """Its square, or its shorter side in 14 pixels or more, would take gigabytes."""
    with pytest.raises(ValueError, match=f"{size[0]} x {size[1]} pixels is too thin"):
        processor(image_resize_strategy=strategy).pixels(Image.new("RGB", size))


def test_what_is_no_image_is_refused():
    for wrong in (None, b"", np.zeros((4, 4, 3), np.uint8)):
        with pytest.raises(TypeError, match=r"^image: expected Pillow's or a path, got "):
            processor().pixels(wrong)
    with pytest.raises(ValueError, match=r"^image: expected some pixels"):
        processor().pixels(Image.new("RGB", (0, 5)))


# --- prompts ------------------------------------------------------------------------------------


def test_prompts():
    build = processing.build_prompt
    assert build("What is this?") == "In: What is this?\nOut:"
    assert build(" <image>\nWhat is this? ") == "In: What is this?\nOut:"
    turns = [("What is this?", " A cat. "), ("<image>Sure?", "")]
    assert build("Why?", turns) == (
        "In: What is this?\nOut: A cat.</s>In: Sure?\nOut:  </s>In: Why?\nOut:"
    )
    assert build("Why?", [("a", "b")], eos="<end>") == "In: a\nOut: b<end>In: Why?\nOut:"
    for empty in ("", "  ", "<image>"):
        with pytest.raises(ValueError, match="question"):
            build(empty)


def test_the_image_goes_after_the_first_token():
    assert processing.splice([1, 5, 6], 3, 9) == [1, 9, 9, 9, 5, 6]
    assert processing.splice([1], 2, 9) == [1, 9, 9]


def with_bos():
    """A tokenizer that adds the first token itself, as Llama's do."""
    tokenizer = tiny_tokenizer.fast()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


@pytest.mark.parametrize("adds", [False, True])
def test_tokens_begin_once(adds):
    tokenizer = with_bos() if adds else tiny_tokenizer.fast()
    assert (tokenizer.encode("a")[0] == BOS) == adds
    made = processor(tokenizer=tokenizer)
    tokens = made.tokens("hi", [("a", "b")])
    assert tokens[0] == BOS and tokens.count(BOS) == 1 and tokens.count(EOS) == 1
    assert tokenizer.decode(tokens[1:]) == "In: a\nOut: b</s>In: hi\nOut:"
    plain, seen = made("hi"), made("hi", drawn())
    assert plain.tokens == made.tokens("hi") and plain.pixel_values is None
    assert seen.tokens == [BOS, *[CONFIG["pad_token_id"]] * 9, *plain.tokens[1:]]
    np.testing.assert_array_equal(seen.pixel_values, made.pixels(drawn()))


def test_prompts_that_do_not_fit_are_refused():
    made = processor(llm_max_length=40)
    room = 40 - 9 - 1 - len("In: \nOut:")
    assert len(made("a" * room, drawn()).tokens) == 40
    with pytest.raises(ValueError, match=r"41 tokens.*40"):
        made("a" * (room + 1), drawn())
    made("a" * (room + 9))
    small = {**WORDS, "vocab_size": 100}
    with pytest.raises(ValueError, match=r"tokenizer.*another model's.*100"):
        processor(text_config=small, pad_token_id=99)("hello")
    pad = tiny_tokenizer.fast().encode("z")[-1]
    with pytest.raises(ValueError, match=f"the token {pad}"):
        processor(pad_token_id=pad)("a z")


# --- from a directory ---------------------------------------------------------------------------


def test_a_directory(tmp_path):
    tiny_tokenizer.write(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    plain = moxin_vlm.load_processor(tmp_path, CONFIG)
    assert plain.towers[0].mean == DINO[0]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(saved_file("letterbox")))
    made = moxin_vlm.load_processor(str(tmp_path), CONFIG)
    assert made.towers[0].mean == (0.484375, 0.455078125, 0.40625)
    drawn().save(tmp_path / "image.png")
    got = made("What is this?", tmp_path / "image.png")
    model = moxin_vlm.Model(moxin_vlm.ModelArgs.from_dict(CONFIG))
    rows = model.embed_inputs(mx.array(got.tokens), pixel_values=got.pixel_values)
    assert rows.shape == (len(got.tokens), WORDS["hidden_size"])
    assert made.tokenizer.decode(got.tokens[10:]) == "In: What is this?\nOut:"
    assert made.tokenizer.eos_token_ids == {EOS}
    (tmp_path / "saved").mkdir()
    made.save_pretrained(tmp_path / "saved")
    again = moxin_vlm.load_processor(tmp_path / "saved", CONFIG)
    assert again.towers == made.towers and again.saved == made.saved
    assert again.tokens("hi") == made.tokens("hi")


@pytest.mark.parametrize("place", ["text_config", "top", "generation_config.json"])
def test_end_tokens_of_the_configuration(place, tmp_path):
    tiny_tokenizer.write(tmp_path)
    config = {"text_config": {**CONFIG, "text_config": {**WORDS, "eos_token_id": 5}}}
    config |= {"top": {**CONFIG, "eos_token_id": [5]}, "generation_config.json": CONFIG}
    if place not in ("text_config", "top"):
        (tmp_path / place).write_text('{"eos_token_id": 5}')
    assert moxin_vlm.load_processor(tmp_path, config[place]).tokenizer.eos_token_ids == {5, EOS}


def test_tokenizers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        moxin_vlm.load_processor(tmp_path, CONFIG)
    tiny_tokenizer.write(tmp_path)
    small = {**CONFIG, "text_config": {**WORDS, "vocab_size": 100}, "pad_token_id": 99}
    with pytest.raises(ValueError, match="another model"):
        moxin_vlm.load_processor(tmp_path, small)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer cannot be read"):
        moxin_vlm.load_processor(tmp_path, CONFIG)


@pytest.mark.parametrize("content", ["{", "[]", '{"tvf_crop_params": 3}'])
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        processing.Processor.from_directory(tmp_path, arguments(), tiny_tokenizer.wrapped())
