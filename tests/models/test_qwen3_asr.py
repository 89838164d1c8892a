"""Qwen3-ASR against transformers: heard rows, logits, greedy tokens, layouts, configurations."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
import qwen3_asr_values as values
from mlx_lm.models.cache import make_prompt_cache
from mlx_lowbit import accelerate
from mlx_lowbit.checkpoint import TensorError
from mlx_lowbit.formats import FORMATS
from mlx_lowbit.models import qwen3_asr
from mlx_lowbit.models.qwen3_asr_audio import AudioEncoder, Conv2d, log_mel, output_length

pytest.importorskip("torch")
pytest.importorskip("transformers")

TOLERANCE = 2e-5
GREEDY = 64
STORED = [f for f in FORMATS if f.judged and (f.group_size == 64 or not f.has_biases)]


@pytest.fixture(scope="module")
def theirs():
    return values.transformers_model()


def assert_close(got, want):
    np.testing.assert_allclose(np.array(got), want, atol=TOLERANCE, rtol=0)


def run(model, tokens, samples, cuts=()):
    """Logits for tokens [1, L] and a clip, the prompt in parts where `cuts` are."""
    heard = mx.array(log_mel(samples))
    x = model.embed_inputs(mx.array(tokens), heard)
    cache = make_prompt_cache(model)
    parts = [
        model(None, cache=cache, input_embeddings=part) for part in mx.split(x, list(cuts), axis=1)
    ]
    return np.array(mx.concatenate(parts, axis=1))


# --- parity -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", values.SECONDS)
def test_audio_features_and_logits(seconds, theirs):
    samples = values.clip(seconds)
    want = values.heard(theirs, samples)
    tokens = values.prompt(len(want))
    logits = values.logits(theirs, tokens, samples)
    models = [accelerated(values.load(theirs)), values.load(theirs)]
    for model in models[: 2 if seconds < 10 else 1]:
        assert_close(model.audio_features(mx.array(values.valid(samples))), want)
        assert_close(run(model, tokens, samples), logits)
        assert_close(run(model, tokens, samples, (4, tokens.shape[1] - 3, -1)), logits)


@pytest.mark.parametrize("stored", STORED, ids=lambda f: f.name)
def test_logits_of_quantized_decoders(stored, theirs):
    model = values.quantize(values.load(theirs), stored)
    accelerate(model)
    assert isinstance(model.model.embed_tokens, mlx_nn.QuantizedEmbedding)
    twin, samples = values.with_decoded_weights(theirs, model), values.clip(8.1)
    tokens = values.prompt(output_length(810))
    want = values.logits(twin, tokens, samples)
    assert_close(run(model, tokens, samples, (60, -1)), want)
    assert np.abs(values.logits(theirs, tokens, samples) - want).max() > 100 * TOLERANCE


@pytest.mark.parametrize("stored", [None, *STORED], ids=lambda f: getattr(f, "name", "float32"))
def test_greedy_tokens(stored, theirs):
    from mlx_lm.generate import generate_step

    model = values.load(theirs)
    if stored is not None:
        values.quantize(model, stored)
        theirs = values.with_decoded_weights(theirs, model).float()
    accelerate(model)
    samples, tokens = values.clip(1), values.prompt(13)
    embeddings = model.embed_inputs(mx.array(tokens), mx.array(log_mel(samples)))[0]
    steps = generate_step(
        mx.array(tokens[0]), model, max_tokens=GREEDY, input_embeddings=embeddings
    )
    got = [int(token) for token, _ in steps]
    assert got == values.greedy(theirs, tokens, samples, GREEDY)
    assert len(set(got)) > 3


def test_mlx_audio_reads_what_this_model_has(theirs):
    asr = pytest.importorskip("mlx_audio.stt.models.qwen3_asr.qwen3_asr")
    model = values.load(theirs)
    other = asr.Qwen3ASRModel(asr.ModelConfig.from_dict(values.flat()))
    other.load_weights(list(other.sanitize(values.parameters(model)).items()))
    heard = mx.array(log_mel(values.clip(8.1)))
    assert_close(model.audio_features(heard), np.array(other.audio_tower(heard[None])))


# --- where other definitions of this model go wrong ----------------------------------------------


def test_tokens_of_frames():
    """As many as the convolutions make; truncating division would make 14 of 100 frames."""
    from transformers.models.qwen3_asr import modeling_qwen3_asr as reference

    lengths = np.arange(1, 2000)
    want = reference._get_feat_extract_output_lengths(lengths)
    assert [output_length(int(n)) for n in lengths] == want.tolist()
    assert [output_length(n) for n in (0, 1, 99, 100, 200, 810)] == [0, 1, 13, 13, 26, 106]


def test_windows_have_104_tokens(theirs):
    """What is heard in one window of 8 s changes nothing in another, and all of its own."""
    model = values.load(theirs)
    heard = log_mel(values.clip(20))
    before = np.array(model.audio_features(mx.array(heard)))
    heard[:, 850] += 1
    changed = (np.array(model.audio_features(mx.array(heard))) != before).any(axis=1)
    assert np.flatnonzero(changed).tolist() == list(range(104, 208))


def test_positions_begin_anew_in_every_chunk(theirs):
    """Windows of equal sound are equal, also where a clip has many."""
    model = values.load(theirs)
    once = values.valid(values.clip(8))
    rows = np.array(model.audio_features(mx.array(np.tile(once, 3))))
    np.testing.assert_allclose(rows.reshape(3, 104, -1), [rows[:104]] * 3, atol=1e-6)


def test_a_short_clip_is_a_filled_up_chunk(theirs):
    """transformers' way; a narrower picture would give the last token another neighbour."""
    model = values.load(theirs)
    short = values.valid(values.clip(0.7))
    long = np.concatenate([short, np.zeros((128, 100 - short.shape[1]), np.float32)], axis=1)
    tower, tokens = model.audio_tower, output_length(short.shape[1])
    one, other = (
        tower._convolve(mx.array(x.T[None].swapaxes(1, 2)[..., None])) for x in (short, long)
    )
    assert mx.abs(one[0, :tokens] - other[0, :tokens]).max().item() > 1e-3
    assert_close(model.audio_features(mx.array(short)), values.heard(theirs, values.clip(0.7)))


def test_prompts_side_by_side(theirs):
    """Batches, and in them steps of one token: rotations that take a row for another are seen."""
    model = accelerated(values.load(theirs))
    clips = [log_mel(values.clip(1, seed)) for seed in (1, 2, 3)]
    tokens = np.repeat(values.prompt(13), 3, axis=0)
    tokens[:, -1] = (10, 20, 30)
    x = model.embed_inputs(mx.array(tokens), [mx.array(each) for each in clips])
    cache, got = make_prompt_cache(model), []
    for part in mx.split(x, [18, 19, 20], axis=1):
        got.append(model(None, cache=cache, input_embeddings=part))
    for row, samples in enumerate(clips):
        want = model.embed_inputs(mx.array(tokens[row : row + 1]), mx.array(samples))
        want = np.array(model(None, input_embeddings=want))[0]
        assert_close(mx.concatenate(got, axis=1)[row], want)


def accelerated(model):
    accelerate(model)
    return model


@pytest.mark.parametrize("places", [0, 12, 14])
def test_places_and_rows_that_do_not_match_are_refused(places, theirs):
    model, heard = values.load(theirs), mx.array(log_mel(values.clip(1)))
    with pytest.raises(ValueError, match=f"expected 13 audio tokens.* got {places}"):
        model.embed_inputs(mx.array(values.prompt(places)), heard)


def test_a_prompt_without_audio(theirs):
    model = values.load(theirs)
    tokens = mx.array(values.prompt(0))
    assert_close(model(None, input_embeddings=model.embed_inputs(tokens)), np.array(model(tokens)))
    with pytest.raises(ValueError, match="expected 0 audio tokens"):
        model.embed_inputs(mx.array(values.prompt(1)))


@pytest.mark.parametrize("shape", [(80, 100), (128, 0)])
def test_features_of_another_shape_are_refused(shape, theirs):
    with pytest.raises(ValueError, match=r"features: expected \[128, frames\]"):
        values.load(theirs).audio_features(mx.zeros(shape))


# --- dtypes, products of our own on a CPU ---------------------------------------------------------


@pytest.mark.parametrize("half", [mx.bfloat16, mx.float16])
def test_half_precision(half, theirs):
    model = values.load(theirs)
    samples, tokens = values.clip(8.1), values.prompt(106)
    want = run(model, tokens, samples)
    model.set_dtype(half)
    accelerate(model)
    x = model.embed_inputs(mx.array(tokens), mx.array(log_mel(samples)))
    got = model(None, input_embeddings=x)
    assert got.dtype == half
    error = np.linalg.norm(np.array(got.astype(mx.float32)) - want) / np.linalg.norm(want)
    assert error < (0.03 if half == mx.bfloat16 else 0.004)


def test_float16_stays_finite(theirs):
    """Sums beyond the range of float16 are clipped, as transformers does."""
    model = values.load(theirs)
    layer = model.audio_tower.layers[0]
    layer.fc2.bias = mx.full(layer.fc2.bias.shape, 60000.0)
    layer.self_attn.out_proj.bias = mx.full(layer.fc2.bias.shape, 20000.0)
    model.set_dtype(mx.float16)
    assert mx.isfinite(model.audio_features(mx.array(log_mel(values.clip(1))))).all().item()


@pytest.mark.parametrize("stored", [f for f in STORED if not f.has_biases], ids=lambda f: f.name)
def test_a_table_that_decodes_to_bfloat16_does_not_decide(stored, theirs):
    model = values.quantize(values.load(theirs), stored)
    assert model.model.embed(mx.array([[1, 2]])).dtype == mx.float32
    assert model(mx.array([[1, 2]])).dtype == mx.float32


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (7, 8), (128, 100), (25, 13)])
def test_convolutions(size):
    mx.random.seed(0)
    convolution = Conv2d(3, 5)
    x = mx.random.normal((2, *size, 3))
    want = mx.conv2d(x, convolution.weight, stride=2, padding=1) + convolution.bias
    assert mx.abs(convolution(x) - want).max().item() < 1e-5


# --- layouts and configurations ------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["transformers", "original", "mlx"])
def test_layouts(layout, theirs):
    model = values.load(theirs, layout)
    assert values.parameters(model).keys() == values.weights(theirs, "mlx").keys()
    values.assert_same(values.parameters(model), values.weights(theirs, "mlx"))
    again = model.sanitize(values.parameters(model))
    values.assert_same(again, values.parameters(model))


def test_convolutions_are_told_by_their_shape(theirs):
    """Not by their names: torch's layout without a prefix, MLX's with one."""
    mlx, torch = values.weights(theirs, "mlx"), values.weights(theirs, "original")
    model = values.load(theirs)
    bare = {name.removeprefix("thinker."): value for name, value in torch.items()}
    values.assert_same(model.sanitize(bare), mlx)
    values.assert_same(model.sanitize({f"thinker.{k}": v for k, v in mlx.items()}), mlx)


def test_a_head_of_another_model_is_refused(theirs):
    weights = values.weights(theirs, "original")
    weights["thinker.lm_head.weight"] = mx.zeros((5000, 64))
    with pytest.raises(TensorError, match="288 rows") as error:
        values.load(theirs).sanitize(weights)
    assert error.value.tensor == "thinker.lm_head.weight"


def test_what_is_quantized(theirs):
    fmt = next(f for f in STORED if f.bits == 8 and f.has_biases)
    model = values.quantize(values.load(theirs), fmt)
    paths = {path for path, layer in model.named_modules() if "scales" in layer}
    assert "model.embed_tokens" in paths and len(paths) == 1 + 7 * 2
    assert all(path.startswith("model.") for path in paths)


def test_a_quantized_encoder_runs(theirs):
    fmt = next(f for f in STORED if f.bits == 8 and f.has_biases)
    heard, model = mx.array(log_mel(values.clip(8.1))), values.load(theirs)
    want = np.array(model.audio_features(heard))
    got = np.array(accelerated(values.quantize(model, fmt, audio=True)).audio_features(heard))
    assert "scales" in model.audio_tower.conv_out
    assert 0 < np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def test_configurations_of_both_layouts_are_one():
    flat, nested = (
        qwen3_asr.ModelArgs.from_dict(each) for each in (values.flat(), values.nested())
    )
    assert nested.support_languages == ("Chinese", "English", "German")
    assert flat.support_languages == tuple(qwen3_asr.LANGUAGES) and len(qwen3_asr.LANGUAGES) == 30
    nested.support_languages = flat.support_languages
    assert flat == nested
    assert flat.text_config.rope_scaling is None and flat.text_config.rope_theta == 1e6
    assert (flat.vocab_size, flat.max_position_embeddings) == (288, 4096)


def test_missing_keys_are_those_of_the_larger_model():
    args = qwen3_asr.ModelArgs.from_dict({"thinker_config": {"text_config": {"head_dim": None}}})
    text, audio = args.text_config, args.audio_config
    assert args == qwen3_asr.ModelArgs()
    assert (text.hidden_size, text.num_hidden_layers, text.head_dim) == (2048, 28, 128)
    assert text.tie_word_embeddings and text.rope_theta == 1e6
    assert (audio.d_model, audio.encoder_layers, audio.output_dim) == (1024, 24, 2048)
    small = {"audio_config": {"d_model": 896}, "text_config": {"hidden_size": 1024}}
    assert qwen3_asr.ModelArgs.from_dict(small).audio_config.output_dim == 1024


@pytest.mark.parametrize(
    "config",
    [
        values.nested(model_type="qwen3_forced_aligner"),
        values.flat(model_type="qwen3_forced_aligner"),
        values.flat(architectures=["Qwen3ASRForTokenClassification"]),
    ],
    ids=["nested", "flat", "architecture"],
)
def test_the_forced_aligner_is_refused(config):
    with pytest.raises(ValueError, match="forced aligner"):
        qwen3_asr.ModelArgs.from_dict(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio_token_id": 288}, "audio_token_id: expected 0 to 287, got 288"),
        ({"audio_config": []}, "audio_config: expected an object"),
        ({"audio_config": {**values.AUDIO, "d_model": 0}}, "d_model: expected a positive integer"),
        ({"audio_config": {**values.AUDIO, "d_model": 66}}, "d_model: expected an even multiple"),
        ({"audio_config": {**values.AUDIO, "output_dim": 32}}, "output_dim: expected the decoder"),
        ({"audio_config": {**values.AUDIO, "n_window_infer": 850}}, "n_window_infer: .* of 100"),
        ({"audio_config": {**values.AUDIO, "activation_function": "relu"}}, "activation_function"),
        ({"text_config": {**values.TEXT, "num_key_value_heads": 3}}, "num_key_value_heads"),
        ({"text_config": {**values.TEXT, "hidden_act": "gelu"}}, "hidden_act: expected 'silu'"),
        ({"text_config": {**values.TEXT, "use_sliding_window": True}}, "use_sliding_window"),
        ({"text_config": {**values.TEXT, "rms_norm_eps": "small"}}, "rms_norm_eps"),
        ({"text_config": {**values.TEXT, "rope_parameters": 3}}, "rope_parameters"),
        ({"support_languages": [1]}, "support_languages: expected names"),
    ],
)
def test_configurations_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        qwen3_asr.ModelArgs.from_dict(values.flat(**change))


def test_sizes_of_the_published_models():
    """Parameters of the smaller model: 8 bits for the decoder, 16 for the encoder, 1.0 GB."""
    args = qwen3_asr.ModelArgs.from_dict(
        {
            "audio_config": {
                "d_model": 896,
                "encoder_layers": 18,
                "encoder_attention_heads": 14,
                "encoder_ffn_dim": 3584,
                "output_dim": 1024,
            },
            "text_config": {"hidden_size": 1024, "intermediate_size": 3072},
        }
    )
    sizes = {k: v.size for k, v in values.parameters(qwen3_asr.Model(args)).items()}
    audio = sum(size for name, size in sizes.items() if name.startswith("audio_tower."))
    small = sum(v for k, v in sizes.items() if k.endswith("norm.weight") and "tower" not in k)
    total = (sum(sizes.values()) - audio - small) * 8.5 / 8 + (audio + small) * 2
    assert total / 1e9 == pytest.approx(1.005, abs=0.002)
    assert AudioEncoder(args.audio_config).conv_out.weight.shape == (896, 7680)
