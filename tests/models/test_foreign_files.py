"""Files of other tools: what they keep beside ``config.json``."""

from __future__ import annotations

import json

import mlx.core as mx
import mlx_lowbit
import pytest
from mlx.utils import tree_flatten

pytest.importorskip("mlx_lm")
pytest.importorskip("torch")
pytest.importorskip("transformers")

import moxin_values as values
import tiny_tokenizer


def test_a_quantize_config_beside_the_configuration(tmp_path):
    """OminiX's files: their names, the bits in a file of their own, config.json as it was."""
    published = values.Composite(text={"vocab_size": 288}).published()
    settings = {**values.CONFIG, "text_config": {**values.TEXT, "vocab_size": 288}}
    model = values.quantize(
        values.load(published, text={"vocab_size": 288}), bits=8, group_size=64, mode="affine"
    )
    want = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), values.ominix(want))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    tiny_tokenizer.write(tmp_path, template=None)
    beside = tmp_path / "quantize_config.json"
    for block in ({"bits": 8, "group_size": 64}, {"quantization": {"bits": 8, "group_size": 64}}):
        beside.write_text(json.dumps(block))
        got = dict(tree_flatten(mlx_lowbit.load(tmp_path)[0].parameters()))
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert mx.array_equal(got[name], value), name
    beside.write_text(json.dumps({"bits": 8, "group_size": 64, "desc_act": False}))
    with pytest.raises(ValueError, match="unexpected"):
        mlx_lowbit.load(tmp_path)
