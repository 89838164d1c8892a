"""Moxin-7B VLM against transformers' classes put together: features, logits, greedy tokens."""

from __future__ import annotations

import copy
import dataclasses

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lowbit import accelerate, quantize_activations

pytest.importorskip("mlx_lm")
pytest.importorskip("torch")
pytest.importorskip("transformers")

import moxin_values as values
import torch
import transformers
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lowbit.models import mistral, moxin_vlm

LOGITS = 2e-5  # how far logits may be off, in float32
FORMATS = {
    "affine3": {"group_size": 64, "bits": 3, "mode": "affine"},
    "affine4": {"group_size": 64, "bits": 4, "mode": "affine"},
    "affine8": {"group_size": 64, "bits": 8, "mode": "affine"},
    "mxfp8": {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}
TEXT = np.random.default_rng(5).integers(3, values.PAD, (1, 20))
TEXT[0, 0] = 1
PIXELS = np.random.default_rng(6).standard_normal((1, 6, 42, 42)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """torch's threads would cost such small products more than they do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def composite():
    return values.Composite()


@pytest.fixture(scope="module")
def published(composite):
    return composite.published()


@pytest.fixture(scope="module", params=[None, *FORMATS], ids=lambda f: f or "unquantized")
def pair(request, published):
    """Our model in a format, and torch's with the weights that it stands for."""
    model, theirs = values.load(published), values.Composite()
    if request.param is not None:
        values.quantize(model, **FORMATS[request.param])
    return model, theirs.take(model)


def embeddings(model, text=TEXT, pixels=PIXELS):
    return model.embed_inputs(values.inputs(text, pixels is not None), pixel_values=pixels)


def logits(model, text=TEXT, pixels=PIXELS, cuts=(), cache=None):
    """All logits, computed in parts with a cache where `cuts` are given."""
    rows = embeddings(model, text, pixels)
    if not cuts and cache is None:
        return np.array(model(None, input_embeddings=rows))
    cache = make_prompt_cache(model) if cache is None else cache
    parts = [model(None, cache=cache, input_embeddings=r) for r in mx.split(rows, cuts, axis=1)]
    return np.array(mx.concatenate(parts, axis=1))


def assert_same(got, want, bound=LOGITS):
    assert got.shape == want.shape
    assert np.abs(got - want).max() < bound


def params(model):
    return dict(tree_flatten(model.parameters()))


# --- the same numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [False, True], ids=["MLX's layers", "accelerated"])
def test_logits(pair, ours):
    model, theirs = copy.deepcopy(pair[0]), pair[1]
    if ours:
        assert accelerate(model).left == []
    got, want = logits(model), theirs.logits(TEXT, PIXELS)
    assert_same(got, want)
    assert_same(logits(model, pixels=None), theirs.logits(TEXT))
    assert np.abs(want[:, -1] - theirs.logits(TEXT)[:, -1]).max() > 0.1  # the image matters


def test_features_are_of_the_second_to_last_block(composite, published):
    model = values.load(published)
    assert_same(np.array(model.vision_backbone(mx.array(PIXELS))), composite.features(PIXELS))


def test_another_activation_would_be_seen(composite):
    approximate = values.Composite(gelu="gelu_pytorch_tanh")
    off = approximate.logits(TEXT, PIXELS) - composite.logits(TEXT, PIXELS)
    assert np.abs(off).max() > LOGITS


@pytest.mark.parametrize("ours", [False, True], ids=["MLX's layers", "accelerated"])
def test_greedy_tokens(pair, ours):
    model, theirs = copy.deepcopy(pair[0]), pair[1]
    if ours:
        accelerate(model)
    want, tokens = theirs.greedy(TEXT, PIXELS, 64), values.inputs(TEXT)[0]
    # Next to the likeliest token none is near enough for rounding to decide.
    text = np.concatenate([TEXT, [want]], axis=1)
    top = np.sort(theirs.logits(text, PIXELS)[0, -65:-1])[:, -2:]
    assert np.diff(top).min() > 4 * LOGITS
    rows = model.embed_inputs(tokens, pixel_values=PIXELS)
    for size in (2048, 8):  # the prompt at once, and in pieces
        steps = generate_step(
            tokens, model, max_tokens=64, prefill_step_size=size, input_embeddings=rows
        )
        assert [token for token, _ in steps] == want


def test_prompts_side_by_side(composite, published):
    model, other = values.load(published), np.flip(TEXT, 1).copy()
    both, pixels = np.concatenate([TEXT, other]), np.concatenate([PIXELS, -PIXELS])
    count = model.args.num_image_tokens
    place = np.full((2, count), values.PAD)
    tokens = mx.array(np.concatenate([both[:, :1], place, both[:, 1:]], axis=1))
    got = np.array(model(None, input_embeddings=model.embed_inputs(tokens, pixel_values=pixels)))
    assert_same(got[:1], composite.logits(TEXT, PIXELS))
    assert_same(got[1:], composite.logits(other, -PIXELS))


def test_bfloat16(published):
    model = values.load(published)
    want = logits(model)
    model.set_dtype(mx.bfloat16)
    rows = embeddings(model)
    assert rows.dtype == mx.bfloat16
    got = np.array(model(None, input_embeddings=rows).astype(mx.float32))
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


# --- the language model -------------------------------------------------------------------------


@pytest.mark.parametrize("window", [1, 8, 28, 29])
def test_a_sliding_window(window, published):
    theirs = values.Composite({"sliding_window": window})
    model = values.load(published, {"sliding_window": window})
    want = theirs.logits(TEXT, PIXELS)  # of 29 tokens
    plain = np.abs(logits(values.load(published)) - want).max()
    assert plain > LOGITS if window < 29 else plain < LOGITS
    assert_same(logits(model), want)
    assert_same(logits(model, cuts=(12, 13, 20, 27, 28)), want)


def test_a_cache_smaller_than_the_window(published):
    models = [values.load(published, {"sliding_window": window}) for window in (18, None)]
    got = [
        logits(model, cuts=(16, 17, 25), cache=make_prompt_cache(model, max_kv_size=14))
        for model in models
    ]
    np.testing.assert_array_equal(*got)


@pytest.mark.cpu  # on CUDA MLX has no product of a slice of such a cache
def test_a_quantized_cache(published):
    tokens, model = values.inputs(TEXT)[0], values.load(published, {"sliding_window": 8})
    rows = model.embed_inputs(tokens, pixel_values=PIXELS)
    made = [
        [t for t, _ in generate_step(tokens, model, max_tokens=8, input_embeddings=rows, **kv)]
        for kv in ({}, {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0})
    ]
    assert made[0] == made[1]


@pytest.mark.parametrize("change", [{"rms_norm_eps": 0.05}, {"rope_theta": 100.0}])
def test_settings_of_the_language_model_are_taken(change, published):
    want = values.Composite(change).logits(TEXT, PIXELS)
    assert_same(logits(values.load(published, change)), want)
    assert np.abs(logits(values.load(published)) - want).max() > LOGITS


def test_mistral_alone():
    settings = {**values.TEXT, "tie_word_embeddings": True, "sliding_window": 5}
    settings |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "head_dim": 24}
    config = transformers.MistralConfig(**settings, attn_implementation="eager")
    theirs = transformers.MistralForCausalLM(config).eval().requires_grad_(False)
    args = mistral.ModelArgs.from_dict(config.to_dict())
    assert (args.rope_theta, args.head_dim, args.sliding_window) == (500.0, 24, 5)
    model = mistral.Model(args)
    weights = {k: mx.array(v.numpy()) for k, v in theirs.state_dict().items()}
    assert "lm_head.weight" in weights
    model.load_weights([*model.sanitize(weights).items()], strict=True)
    want = theirs(torch.from_numpy(TEXT)).logits.numpy()
    assert_same(np.array(model(mx.array(TEXT))), want)


# --- configurations -----------------------------------------------------------------------------


def test_missing_keys_are_those_of_the_reference_class():
    """A nested configuration is saved as its difference to the class's defaults."""
    saved = {"model_type": "mistral", "num_hidden_layers": 36, "vocab_size": 32064}
    saved |= {"pad_token_id": 32000, "torch_dtype": "bfloat16", "head_dim": None}
    text = moxin_vlm.ModelArgs.from_dict({"model_type": "prismatic", "text_config": saved}).text
    reference = transformers.MistralConfig(**{**saved, "head_dim": 128})
    for field in dataclasses.fields(text):
        if field.name not in ("rope_theta", "rope_scaling"):
            assert getattr(text, field.name) == getattr(reference, field.name), field.name
    assert text.rope_theta == reference.rope_parameters["rope_theta"]
    assert text.rms_norm_eps == 1e-6 and text.rope_scaling is None
    assert moxin_vlm.ModelArgs.from_dict({"model_type": "prismatic"}).text == text
    assert mistral.ModelArgs.from_dict({"sliding_window": None}).sliding_window is None


def test_the_published_layout():
    args = moxin_vlm.ModelArgs.from_dict({"model_type": "prismatic", "unknown": 1})
    assert args.num_image_tokens == 256 and args.max_position_embeddings == 2048
    shapes = {name: value.shape for name, value in params(moxin_vlm.Model(args)).items()}
    dino, siglip = "vision_backbone.featurizer", "vision_backbone.fused_featurizer"
    layer = "language_model.model.layers.35"
    expected = {
        f"{dino}.cls_token": (1, 1, 1024),
        f"{dino}.reg_token": (1, 4, 1024),
        f"{dino}.pos_embed": (1, 256, 1024),
        f"{dino}.patch_embed.proj.weight": (1024, 3, 14, 14),
        f"{dino}.blocks.22.attn.qkv.weight": (3072, 1024),
        f"{dino}.blocks.22.ls1.scale_factor": (1024,),
        f"{dino}.blocks.22.mlp.fc1.weight": (4096, 1024),
        f"{siglip}.pos_embed": (1, 256, 1152),
        f"{siglip}.patch_embed.proj.bias": (1152,),
        f"{siglip}.blocks.25.attn.qkv.bias": (3456,),
        f"{siglip}.blocks.25.mlp.fc2.weight": (1152, 4304),
        "projector.fc1.weight": (8704, 2176),
        "projector.fc2.weight": (4096, 8704),
        "projector.fc3.bias": (4096,),
        "language_model.model.embed_tokens.weight": (32064, 4096),
        f"{layer}.self_attn.k_proj.weight": (1024, 4096),
        f"{layer}.mlp.down_proj.weight": (4096, 14336),
        "language_model.model.norm.weight": (4096,),
        "language_model.lm_head.weight": (32064, 4096),
    }
    assert expected.items() <= shapes.items()
    assert not any(".blocks.23." in n for n in shapes if n.startswith(f"{dino}."))
    sizes = {name: np.prod(shape) for name, shape in shapes.items()}
    text = sum(size for name, size in sizes.items() if name.startswith("language_model."))
    assert round(text / 1e9, 2) == 8.11


@pytest.mark.parametrize(
    "change, message",
    [
        ({"text_config": {"model_type": "llama"}}, "text_config.*'llama'"),
        ({"text_config": {"hidden_size": -1}}, "text_config: hidden_size.*-1"),
        ({"text_config": {"sliding_window": "4096"}}, "sliding_window"),
        ({"text_config": {"num_key_value_heads": 3}}, "num_key_value_heads.*3"),
        ({"text_config": {"rms_norm_eps": "small"}}, "rms_norm_eps"),
        ({"text_config": {"hidden_act": "gelu"}}, "hidden_act.*'gelu'"),
        ({"text_config": {"rope_parameters": 3}}, "rope_parameters"),
        ({"text_config": 3}, "text_config"),
        ({"arch_specifier": "no-align+linear"}, "arch_specifier.*linear"),
        ({"use_fused_vision_backbone": False}, "use_fused_vision_backbone"),
        ({"timm_model_ids": ["vit_huge", moxin_vlm.SIGLIP_ID]}, "timm_model_ids.*'vit_huge'"),
        ({"timm_override_act_layers": ["quick_gelu", None]}, "timm_override_act_layers"),
        ({"image_sizes": [224]}, "image_sizes"),
        ({"image_sizes": [224, 238]}, "image_sizes.*256 and 289"),
        ({"image_sizes": [225, 225]}, "image_size.*multiple.*225"),
        ({"image_resize_strategy": "squash"}, "image_resize_strategy.*'squash'"),
        ({"pad_token_id": 32064}, "pad_token_id.*32064"),
        ({"llm_max_length": 0}, "llm_max_length"),
        ({"vision_backbone_config": {"featurizer": {"num_hidden_layers": 1}}}, "second-to-last"),
    ],
)
def test_configurations_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        moxin_vlm.ModelArgs.from_dict({"model_type": "prismatic", **change})


# --- checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [values.native, values.ominix])
@pytest.mark.parametrize("stored", [None, "affine8"])
def test_layouts(layout, stored, published):
    model, fmt = values.load(published), FORMATS.get(stored)
    if fmt is not None:
        values.quantize(model, **fmt)
    want = params(model)
    weights = layout(want)
    assert set(weights) != set(want)
    got = params(values.load(weights, fmt=fmt))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert mx.array_equal(got[name], value), name


@pytest.mark.parametrize("stored", FORMATS)
def test_what_is_quantized_and_saved_loads(stored, published, tmp_path):
    model = values.quantize(values.load(published), **FORMATS[stored])
    quantized = {path for path, layer in model.named_modules() if "scales" in layer}
    assert quantized == {
        path
        for path, layer in values.load(published).named_modules()
        if path.startswith("language_model.") and isinstance(layer, mlx_nn.Linear)
    }
    assert len(quantized) == 7 * 3 + 1
    weights = params(model)
    # Nothing is left to rename in what we save.
    assert model.sanitize(weights).keys() == weights.keys()
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    again = values.load(mx.load(str(tmp_path / "model.safetensors")), fmt=FORMATS[stored])
    np.testing.assert_array_equal(logits(again), logits(model))


def test_what_no_feature_depends_on_is_dropped(published):
    model = values.load(published)
    left = published.keys() - model.sanitize(published).keys()
    starts = ("featurizer.blocks.2.", "featurizer.norm.", "fused_featurizer.blocks.3.")
    starts += ("fused_featurizer.norm.", "fused_featurizer.attn_pool.")
    found = [s for s in starts if any(n.startswith(f"vision_backbone.{s}") for n in left)]
    assert found == [*starts]
    assert all(n.startswith(tuple(f"vision_backbone.{s}" for s in starts)) for n in left)


def test_a_missing_part_is_left_for_the_loader_to_name(published):
    weights = values.ominix(published)
    lost = "vision_backbone.featurizer.0.blocks.0.attn.k_proj.weight"
    del weights[lost]
    with pytest.raises(ValueError, match=r"attn\.q"):
        values.load(weights)


def test_activations_are_quantized_in_the_language_model_alone(published):
    model = values.quantize(values.load(published), **FORMATS["mxfp8"])
    want = logits(model)
    report = quantize_activations(model)
    assert len(report.replaced) == 7 * 3 + 1
    assert all(path.startswith("language_model.") for path, _, _ in report.replaced)
    off = np.linalg.norm(logits(model) - want) / np.linalg.norm(want)
    assert 1e-4 < off < 0.2
    affine = values.quantize(values.load(published), **FORMATS["affine4"])
    with pytest.raises(ValueError, match="affine"):
        quantize_activations(affine)


# --- the place of an image ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", ["none", "later", "first", "first as well", "one less", "too short"]
)
def test_a_prompt_without_a_place_for_the_image_is_refused(case, published):
    model, text = values.load(published), TEXT[0].tolist()
    pads = [values.PAD] * model.args.num_image_tokens
    tokens = {
        "none": text,
        "later": [*text[:2], *pads, *text[2:]],
        "first": [*pads, *text],
        "one less": [text[0], *pads[1:], *text[1:]],
        "first as well": [*pads, values.PAD, *text],
        "too short": [text[0], *pads[1:]],
    }[case]
    with pytest.raises(ValueError, match=r"inputs.*9 times pad_token_id 150"):
        model.embed_inputs(mx.array(tokens), pixel_values=PIXELS)


@pytest.mark.parametrize("shape", [(1, 3, 42, 42), (1, 6, 42, 28), (6, 42, 42), (2, 6, 42, 42)])
def test_images_of_another_shape_are_refused(shape, published):
    model = values.load(published)
    with pytest.raises(ValueError, match="pixel"):
        model.embed_inputs(values.inputs(TEXT), pixel_values=np.zeros(shape, np.float32))


def test_only_the_rows_of_the_image_change(published):
    model, tokens = values.load(published), values.inputs(TEXT)[0]
    plain, rows = model.embed_inputs(tokens), model.embed_inputs(tokens, pixel_values=PIXELS)
    changed = np.flatnonzero(np.any(np.array(plain) != np.array(rows), axis=-1))
    assert changed.tolist() == [*range(1, 1 + model.args.num_image_tokens)]
    image = np.array(model.encode_image(mx.array(PIXELS)))[0]
    np.testing.assert_array_equal(np.array(rows)[1:10], image)
