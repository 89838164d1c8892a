"""Saving: what is written loads here and in mlx-lm bit for bit, and nothing is half-written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as mlx_nn
import mlx_lowbit
import numpy as np
import pytest
from checkpoint_values import (
    INDEX,
    MODEL,
    assert_same,
    checkpoint,
    config,
    need_global_scales_of_experts,
    new_model,
    parameters,
    published,
    write,
)
from mlx_lowbit import checkpoint as files
from mlx_lowbit.formats import FORMATS
from mlx_lowbit.load import load
from mlx_lowbit.save import count, save
from tiny_tokenizer import wrapped

pytest.importorskip("mlx_lm")
pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

STORED = [f for f in FORMATS if f.group_size <= 64 and (f.judged or f.mode == "mxfp4")]
VALUE = "model.layers.2.self_attn.v_proj"


def stored(directory: Path) -> dict[str, mx.array]:
    return {n: v for f in directory.glob("*.safetensors") for n, v in mx.load(str(f)).items()}


def theirs(directory: Path) -> mlx_nn.Module:
    import mlx_lm

    return mlx_lm.load(str(directory))[0]


@pytest.mark.parametrize("form", [None, *STORED], ids=lambda f: getattr(f, "name", "bfloat16"))
def test_what_is_saved_loads_again(tmp_path, form):
    keywords = {} if form is None else {"bits": form.bits, "mode": form.mode}
    if form is not None:
        keywords["group_size"] = form.group_size
    model, tokenizer = load(checkpoint(tmp_path / "source"), **keywords)
    path = save(model, tmp_path / "saved")
    assert_same(stored(path), model)
    again, same = load(path)
    assert_same(again, model)
    assert_same(theirs(path), model)
    assert same.encode("some words") == tokenizer.encode("some words")
    assert same.chat_template == tokenizer.chat_template
    if form is not None:
        tokens = mx.array([[3, 1, 4, 1, 5]])
        assert mx.array_equal(again(tokens), model(tokens)).item()


def test_layers_of_several_formats(tmp_path):
    settings = config()
    model = new_model(settings)
    for path, bits, mode in (
        ("o_proj", 8, "mxfp8"),
        ("lm_head", 6, "affine"),
        ("v_proj", 3, "affine"),
    ):
        mlx_nn.quantize(
            model,
            bits=bits,
            mode=mode,
            class_predicate=lambda p, m, end=path: p.endswith(end) and hasattr(m, "to_quantized"),
        )  # form: skip
    saved = save(model, tmp_path / "saved", wrapped(), config=settings)
    block = json.loads((saved / "config.json").read_text())["quantization"]
    assert {k: block.pop(k) for k in ("bits", "mode")} in (
        {"bits": 8, "mode": "mxfp8"},
        {"bits": 3, "mode": "affine"},
    )
    assert block.pop("group_size") in (32, 64)
    assert block["lm_head"] == {"group_size": 64, "bits": 6, "mode": "affine"}
    assert_same(load(saved)[0], model)
    assert_same(theirs(saved), model)


def test_configuration(tmp_path):
    more = {"_name_or_path": "x", "own": {"key": [1, math.inf]}, "quantization_config": {"bits": 4}}
    source = checkpoint(tmp_path / "source")
    model, _ = load(source, bits=8)
    settings = json.loads((source / "config.json").read_text())
    path = save(model, tmp_path / "saved", config=settings | more)
    written = json.loads((path / "config.json").read_text())
    block = {"group_size": 64, "bits": 8, "mode": "affine"}
    assert written.pop("quantization") == written.pop("quantization_config") == block
    assert written.pop("own") == {"key": [1, {"__float__": "Infinity"}]}
    assert written == settings
    text = (path / "config.json").read_text()
    assert list(json.loads(text)) == sorted(json.loads(text)) and '\n    "' in text
    plain = save(load(source)[0], tmp_path / "plain", config=settings | more)
    assert (
        not {"quantization", "quantization_config"}
        & json.loads((plain / "config.json").read_text()).keys()
    )


@pytest.mark.parametrize("layout", ["rope_parameters", "defaults left out"])
def test_what_mlx_lm_needs_of_a_configuration_is_written(tmp_path, layout):
    """Our definition does without it, mlx-lm's does not."""
    rope, settings = ("rope_theta", "rope_scaling", "partial_rotary_factor"), config()
    missing = (*rope, "n_group", "topk_group", "routed_scaling_factor")
    shorter = {k: v for k, v in settings.items() if k not in missing}
    if layout == "rope_parameters":
        shorter |= {k: settings[k] for k in missing if k in settings and k not in rope}
        parameters_of_rope = {"rope_type": "default", "rope_theta": 5e5, rope[2]: 0.25}
        shorter["rope_parameters"] = parameters_of_rope
    model, _ = load(write(tmp_path / "source", published(new_model(settings)), shorter))
    saved = save(model, tmp_path / "saved")
    written = json.loads((saved / "config.json").read_text())
    assert {k: written[k] for k in shorter} == shorter
    other = theirs(saved)
    assert_same(other, model)
    for name in missing:
        assert getattr(other.args, name) == getattr(model.args, name), name
    again, _ = load(saved)
    assert again.args == model.args


def test_shards(tmp_path, monkeypatch):
    limit = 100_000
    monkeypatch.setattr(files, "SHARD_BYTES", limit)
    model, _ = load(checkpoint(tmp_path / "source"), bits=4)
    path = save(model, tmp_path / "saved")
    names = sorted(file.name for file in path.glob("*.safetensors"))
    assert names == [
        f"model-{i + 1:05d}-of-{len(names):05d}.safetensors" for i in range(len(names))
    ]
    assert len(names) > 3
    index, own = json.loads((path / INDEX).read_text()), parameters(model)
    assert list(index["weight_map"]) == sorted(own)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in own.values())
    for name in names:
        with safetensors.safe_open(path / name, framework="numpy") as file:
            held = set(file.keys())
            assert file.metadata() == {"format": "mlx"}
        assert held == {n for n, place in index["weight_map"].items() if place == name}
        assert sum(own[n].nbytes for n in held) <= limit
    assert_same(load(path)[0], model)
    assert_same(theirs(path), model)


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [
        ([], []),
        ([0, 0], [2]),
        ([11], [1]),  # one alone that is too large: no empty shard before it
        ([11, 1], [1, 1]),
        ([5, 5, 1], [2, 1]),
        ([4, 4, 4, 11, 2], [2, 1, 1, 1]),
    ],
)
def test_a_plan_of_shards(sizes, shards):
    plan = files.plan_shards({str(i): size for i, size in enumerate(sizes)}, 10)
    assert [len(shard) for shard in plan] == shards
    assert [name for shard in plan for name in shard] == [str(i) for i in range(len(sizes))]


@pytest.mark.parametrize("form", STORED, ids=lambda f: f.name)
def test_parameters_are_counted_as_in_mlx_lm(tmp_path, form):
    from mlx_lm.utils import get_total_parameters

    path = checkpoint(tmp_path)
    model, _ = load(path, bits=form.bits, mode=form.mode, group_size=form.group_size)
    plain = new_model(config())
    assert count(model) == count(plain) == get_total_parameters(model)


def test_files_beside_the_weights(tmp_path):
    source = checkpoint(tmp_path / "source")
    kept = {
        "generation_config.json": '{"eos_token_id": [1, 2]}',
        "preprocessor_config.json": "{}",
        "vocab.json": "{}",
        "merges.txt": "a b",
        "own.py": "raise SystemExit",
    }
    left = {"model.safetensors.index.json.bak": "", "hf_quant_config.json": "{}", "big.bin": "x"}
    for name, text in (kept | left).items():
        (source / name).write_text(text)
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("t")
    path = save(load(source)[0], tmp_path / "saved")
    for name, text in kept.items():
        assert (path / name).read_text() == text
    assert not [name for name in left if (path / name).exists()]
    assert (path / "additional_chat_templates" / "tools.jinja").read_text() == "t"
    assert sorted(path.glob("token*")) and (path / "chat_template.jinja").is_file()


def test_card(tmp_path):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    source = checkpoint(tmp_path / "source")
    (source / "README.md").write_text(
        "---\nlicense: mit\ntags: [chat]\nbase_model: a/b\n---\n# Old\n"
    )
    path = save(load(source, bits=3)[0], tmp_path / "saved")
    data = huggingface_hub.metadata_load(path / "README.md")
    assert data["license"] == "mit" and data["base_model"] == "a/b"
    assert (data["library_name"], data["pipeline_tag"]) == ("mlx", "text-generation")
    assert data["tags"] == ["chat", "mlx"]
    text = (path / "README.md").read_text()
    assert "affine 3-bit, groups of 64; 3.5" in text and "# saved" in text and "Old" not in text
    (source / "README.md").write_text("---\n: [broken\n---\n")
    save(load(source)[0], tmp_path / "other")


# --- models in other states ---------------------------------------------------------------------


def test_quantized_activations_are_saved_as_weight_only(tmp_path):
    model, _ = load(checkpoint(tmp_path / "source"), mode="mxfp8", quantize_activations=True)
    path = save(model, tmp_path / "saved")
    again, _ = load(path)
    assert_same(again, model)
    assert_same(theirs(path), model)
    assert not isinstance(again.lm_head, mlx_lowbit.nn.QQLinear)
    assert isinstance(load(path, quantize_activations=True)[0].lm_head, mlx_lowbit.nn.QQLinear)


def test_merged_products(tmp_path):
    """Their parameters are slices of one array."""
    model, _ = load(checkpoint(tmp_path / "source"), bits=4)
    own = {name: mx.array(value) for name, value in parameters(model).items()}
    mlx_lowbit.accelerate(model, merge=False)  # on a GPU they are when it is loaded
    assert mlx_lowbit.accelerate(model, merge=True).merged
    assert_same(stored(save(model, tmp_path / "saved")), own)


def test_arrays_that_are_not_in_row_order(tmp_path):
    model, _ = load(checkpoint(tmp_path / "source"))
    weight = mx.random.normal((128, 64)).astype(mx.bfloat16)
    dict(model.named_modules())[VALUE].weight = weight.T
    assert_same(load(save(model, tmp_path / "saved"))[0], model)


def test_global_scales(tmp_path):
    need_global_scales_of_experts()
    settings = config()
    model = new_model(settings)
    block = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    mlx_nn.quantize(
        model,
        class_predicate=lambda p, m: (
            hasattr(m, "to_quantized") and block | ({"global_scale": True} if "switch" in p else {})
        ),
    )
    source = write(tmp_path / "source", parameters(model), settings | {"quantization": block})
    path = save(load(source)[0], tmp_path / "saved")
    assert_same(load(path)[0], model)
    assert_same(theirs(path), model)


def test_a_model_from_elsewhere_needs_its_configuration(tmp_path):
    settings = config()
    model = new_model(settings)
    with pytest.raises(ValueError, match=r"^config: expected the model's config.json"):
        save(model, tmp_path / "saved")
    assert not list(tmp_path.iterdir())
    save(model, tmp_path / "saved", wrapped(), config=settings)
    assert_same(load(tmp_path / "saved")[0], model)
    with pytest.raises(TypeError, match=r"^model: expected an mlx.nn.Module"):
        save({}, tmp_path / "other")  # type: ignore[arg-type]


def test_a_lazy_model(tmp_path):
    source = checkpoint(tmp_path / "source")
    model, _ = load(source, bits=4, lazy=True)
    path = save(model, tmp_path / "saved")
    assert_same(stored(path), load(source, bits=4)[0])
    assert_same(stored(path), model)


# --- nothing half-written -----------------------------------------------------------------------


def test_a_path_that_is_there_is_left_alone(tmp_path):
    source = checkpoint(tmp_path / "source")
    model, _ = load(source, bits=4)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(FileExistsError, match=f"^{source}: already exists"):
        save(model, source)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            save(model, tmp_path / name)
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    save(model, tmp_path / "new" / "folders" / "saved")


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    model, _ = load(checkpoint(tmp_path / "source"), bits=4)
    monkeypatch.setattr(files, "SHARD_BYTES", 100_000)
    written: list[str] = []
    own = mx.save_safetensors

    def fail(name: str, *arguments: Any, **named: Any) -> None:
        if written:
            raise RuntimeError("no space left on device")
        written.append(name)
        assert not (tmp_path / "saved").exists()
        own(name, *arguments, **named)

    monkeypatch.setattr(mx, "save_safetensors", fail)
    with pytest.raises(RuntimeError, match="no space"):
        save(model, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["source"] and written
    monkeypatch.setattr(mx, "save_safetensors", own)
    assert_same(load(save(model, tmp_path / "saved"))[0], model)


def test_a_path_that_appears_meanwhile_is_left_alone(tmp_path, monkeypatch):
    model, _ = load(checkpoint(tmp_path / "source"), bits=4)
    own = mx.save_safetensors

    def appear(name: str, *arguments: Any, **named: Any) -> None:
        (tmp_path / "saved").mkdir()
        (tmp_path / "saved" / "of another process").write_text("x")
        own(name, *arguments, **named)

    monkeypatch.setattr(mx, "save_safetensors", appear)
    with pytest.raises(OSError):
        save(model, tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["of another process"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "source"]


def test_too_little_space(tmp_path, monkeypatch):
    class Usage(NamedTuple):
        free: int = 1000

    model, _ = load(checkpoint(tmp_path / "source"))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: Usage())
    with pytest.raises(OSError, match="GB to write"):
        save(model, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_files_of_torch_and_of_ours_hold_the_same(tmp_path):
    """The library reads what MLX wrote, without MLX."""
    pytest.importorskip("torch")
    model = new_model(config())
    path = write(tmp_path / "source", published(model), config())
    saved = save(load(path)[0], tmp_path / "saved")
    with safetensors.safe_open(saved / MODEL, framework="pt") as file:
        value = file.get_tensor(f"{VALUE}.weight").float().numpy()
    np.testing.assert_array_equal(
        value, np.array(parameters(model)[f"{VALUE}.weight"].astype(mx.float32))
    )
