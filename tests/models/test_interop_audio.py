"""What convert writes of Qwen3-ASR, in mlx-audio: the same parameters and the same logits."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("mlx_audio")
pytest.importorskip("transformers")

import qwen3_asr_values as values
from mlx.utils import tree_flatten
from mlx_lowbit import convert, demo_models, load, undo


@pytest.fixture(scope="module", params=["original", "transformers"])
def directory(request, tmp_path_factory):
    """A converted checkpoint, with the preprocessor's file that published ones have."""
    from transformers import WhisperFeatureExtractor

    found = tmp_path_factory.mktemp("audio")
    if request.param == "original":
        demo_models.write_checkpoint(demo_models.QWEN, found / "source")
    else:
        tensors = values.weights(values.transformers_model(), "transformers")
        tensors = {name: value.astype(mx.bfloat16) for name, value in tensors.items()}
        (found / "source").mkdir()
        mx.save_safetensors(str(found / "source" / "model.safetensors"), tensors)
        (found / "source" / "config.json").write_text(json.dumps(values.flat()))
        values.write_tokenizer(found / "source")
    WhisperFeatureExtractor(feature_size=128).save_pretrained(found / "source")
    convert(found / "source", found / "converted", quantize=True, q_bits=8)
    return found / "converted"


def test_mlx_audio_loads_the_same_model(directory):
    from mlx_audio.stt.utils import load_model

    ours, processor = load(directory)
    theirs = load_model(directory)
    a, b = (dict(tree_flatten(model.parameters())) for model in (ours, theirs))
    b = {name.removeprefix("_model."): value for name, value in b.items()}
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert mx.array_equal(value, b[name]).item(), name

    noise = 0.1 * np.random.default_rng(0).standard_normal(20000).astype(np.float32)
    inputs = processor(noise, "English")
    tokens, features = mx.array([inputs.tokens]), mx.array(inputs.features)
    undo(ours)  # the same kernels on both sides
    for model in (ours, theirs):  # bfloat16 rounds the encoders' sums apart
        model.set_dtype(mx.float32)
    got = ours(None, input_embeddings=ours.embed_inputs(tokens, features))
    want = theirs(
        tokens,
        input_features=features[None],
        feature_attention_mask=mx.ones((1, features.shape[1]), mx.int32),
    )
    assert mx.abs(got - want).max().item() <= 1e-4 * mx.abs(want).max().item()
    assert mx.array_equal(mx.argmax(got, -1), mx.argmax(want, -1)).item()
