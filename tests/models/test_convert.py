"""Conversion: the files of mlx_lm.convert bit for bit, recipes, sizes, and what is refused."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import oracle
import pytest
from checkpoint_values import (
    CONFIG,
    INDEX,
    assert_same,
    checkpoint,
    config,
    new_model,
    parameters,
    published,
    write,
)
from layer_values import decoded
from mixture_values import quantized_layers
from mlx_lowbit import checkpoint as files
from mlx_lowbit import recipes
from mlx_lowbit.load import load

mlx_lm = pytest.importorskip("mlx_lm")
pytest.importorskip("transformers")

# The module: the package may show the function of this name.
module = importlib.import_module("mlx_lowbit.convert")
convert = module.convert


def stored(directory: Path) -> dict[str, mx.array]:
    return {n: v for f in directory.glob("*.safetensors") for n, v in mx.load(str(f)).items()}


def settings_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
    "4-bit": {"quantize": True},
    "3-bit, groups of 32": {"quantize": True, "q_bits": 3, "q_group_size": 32},
    "8-bit in float16": {"quantize": True, "q_bits": 8, "dtype": "float16"},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4"},
    "mxfp8": {"quantize": True, "q_mode": "mxfp8"},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4"},
    **{
        name: {"quantize": True, "quant_predicate": name, "q_group_size": 64}
        for name in ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_files_of_mlx_lm(tmp_path, name):
    """Every tensor, bit for bit, and layers that each reads as the other wrote them."""
    source = checkpoint(tmp_path / "source", num_hidden_layers=9)
    convert(source, tmp_path / "ours", **OPTIONS[name])
    mlx_lm.convert(str(source), str(tmp_path / "theirs"), **OPTIONS[name])
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert_same(ours, theirs)
    index, other = (json.loads((tmp_path / n / INDEX).read_text()) for n in ("ours", "theirs"))
    assert index == other
    for path in ("ours", "theirs"):
        assert_same(load(tmp_path / path)[0], ours)
        assert_same(mlx_lm.load(str(tmp_path / path))[0], ours)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "source", "theirs"]


@pytest.mark.parametrize("asked", ["4-bit", "mxfp8", "nvfp4", "mixed_3_6"])
def test_dequantized(tmp_path, asked):
    """Decoded and rounded once; mlx-lm computes scale * code + bias in bfloat16."""
    convert(checkpoint(tmp_path / "source"), tmp_path / "small", **OPTIONS[asked])
    convert(tmp_path / "small", tmp_path / "plain", dequantize=True)
    small, _ = load(tmp_path / "small")
    plain, own = stored(tmp_path / "plain"), parameters(small)
    layers = quantized_layers(small) | {"model.embed_tokens": small.model.embed_tokens}
    for path, layer in layers.items():
        value, want = plain.pop(f"{path}.weight"), decoded(layer)
        assert value.dtype == mx.bfloat16
        assert (np.abs(oracle.f64(value) - want) <= np.abs(want) * 2.0**-8).all()
        for kind in ("weight", "scales", "biases"):
            own.pop(f"{path}.{kind}", None)
    assert_same(plain, own)
    assert settings_of(tmp_path / "plain") == settings_of(tmp_path / "source")
    assert_same(mlx_lm.load(str(tmp_path / "plain"))[0], load(tmp_path / "plain")[0])


def test_memory(tmp_path, monkeypatch):
    """One shard and the sources of a tensor, not the model."""
    limit = 300_000
    monkeypatch.setattr(files, "SHARD_BYTES", limit)
    source = checkpoint(tmp_path / "source", num_hidden_layers=12, moe_intermediate_size=256)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    table = convert(source, tmp_path / "small", quantize=True, q_bits=8)
    peak = mx.get_peak_memory() - before
    experts = 8 * 256 * 128 * 2  # bytes of one projection, once as files hold it and once stacked
    assert table.bytes > 8 * limit
    assert peak < limit + 4 * experts < table.bytes / 2


def test_what_is_stored_quantized_keeps_its_scales(tmp_path):
    """torch_dtype says bfloat16; casting scales would change every weight."""
    model = new_model(config())
    model.set_dtype(mx.float16)
    mlx_nn.quantize(model, 64, 4)
    block = {"group_size": 64, "bits": 4, "mode": "affine"}
    write(tmp_path / "source", parameters(model), config(quantization=block))
    convert(tmp_path / "source", tmp_path / "copy")
    assert_same(stored(tmp_path / "copy"), model)
    assert settings_of(tmp_path / "copy")["quantization"] == block


# --- recipes ------------------------------------------------------------------------------------


class Layers(mlx_nn.Module):
    """A model of 16 layers with the names that recipes look for, and a tower."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = mlx_nn.Embedding(64, 64)
        self.lm_head = mlx_nn.Linear(64, 64)
        self.vision_tower, self.audio_tower = mlx_nn.Module(), mlx_nn.Module()
        self.vision_tower.v_proj = mlx_nn.Linear(64, 64)
        self.audio_tower.v_proj = mlx_nn.Linear(64, 64)
        self.layers = [mlx_nn.Module() for _ in range(16)]
        for layer in self.layers:
            for name in ("q_proj", "v_proj", "up_proj", "down_proj"):
                layer[name] = mlx_nn.Linear(64, 64)


MORE = (0, 1, 4, 7, 10, 13, 14, 15)
HEADS = {"mlx_lm": ("lm_head",), "mlx_vlm": ("lm_head", "embed_tokens")}
TABLE = [
    *((f"mixed_{low}_{high}", low, high, "mlx_lm") for low, high in ((2, 6), (3, 4), (3, 6), (4, 6))),
    *(
        (f"mlx_vlm.mixed_{low}_{high}", low, high, "mlx_vlm")
        for low, high in ((2, 6), (3, 4), (3, 5), (3, 6), (3, 8), (4, 6), (4, 8))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "low", "high", "tool"), TABLE, ids=[row[0] for row in TABLE])
def test_recipes(name, low, high, tool):
    model = Layers()
    chosen = recipes.requested(model, recipes.storage("affine", None, 32), name)
    group = 64 if tool == "mlx_vlm" else 32
    assert {(s.mode, s.group_size) for s in chosen.values()} == {("affine", group)}
    best = {f"layers.{i}.{n}" for i in MORE for n in ("v_proj", "down_proj")} | set(HEADS[tool])
    assert {path for path, s in chosen.items() if s.bits == high} == best
    assert {s.bits for path, s in chosen.items() if path not in best} == {low}
    assert len(chosen) == 16 * 4 + 2


def test_recipes_are_these():
    assert sorted(recipes.RECIPES) == sorted(row[0] for row in TABLE)
    with pytest.raises(ValueError, match=r"recipe must be one of mixed_2_6, .*, got 'mixed_9_9'"):
        recipes.mixed("mixed_9_9", Layers())
    with pytest.raises(ValueError, match="needs layers named down_proj"):
        recipes.mixed("mixed_3_6", mlx_nn.Linear(64, 64))


def test_what_reads_images_and_sound_is_quantized_when_asked():
    model, default = Layers(), recipes.storage("affine", 4, 64)
    towers = {"vision": "vision_tower.v_proj", "audio": "audio_tower.v_proj"}
    for asked in ({}, {"vision": True}, {"audio": True}, {"vision": True, "audio": True}):
        chosen = recipes.requested(model, default, **asked)
        assert {t for t in towers.values() if t in chosen} == {towers[name] for name in asked}


def test_predicates_of_models_and_of_the_caller():
    class Own(Layers):
        def quant_predicate(self, path: str, _: mlx_nn.Module) -> bool | dict[str, Any]:
            return {"group_size": 32, "bits": 8} if "q_proj" in path else "lm_head" not in path

    default = recipes.storage("mxfp8")
    chosen = recipes.requested(Own(), default)
    assert chosen["layers.3.q_proj"] == recipes.Storage("affine", 8, 32)
    assert chosen["layers.3.v_proj"] == default and "lm_head" not in chosen
    chosen = recipes.requested(Own(), default, lambda path, _: path.endswith(("up_proj", "head")))
    assert sorted(chosen) == sorted(f"layers.{i}.up_proj" for i in range(16))
    with pytest.raises(
        ValueError, match=r"^embed_tokens: expected true, false or an object, got 'yes'"
    ):
        recipes.requested(Own(), default, lambda path, _: "yes")
    with pytest.raises(ValueError, match="no layer can be quantized in groups of 128"):
        recipes.requested(Layers(), recipes.storage("affine", 4, 128))


# --- sizes --------------------------------------------------------------------------------------

AIR = {
    "model_type": "glm4_moe", "attention_bias": True, "first_k_dense_replace": 1, "head_dim": 128,
    "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_routed_experts": 128, "n_shared_experts": 1, "num_attention_heads": 96,
    "num_key_value_heads": 8, "num_experts_per_tok": 8, "num_hidden_layers": 46,
    "rope_theta": 1000000, "use_qk_norm": False, "vocab_size": 151552, "torch_dtype": "bfloat16",
}  # fmt: skip
MOXIN = {
    "model_type": "prismatic", "vision_backbone_id": "dinosiglip-vit-so-224px",
    "arch_specifier": "no-align+fused-gelu-mlp", "use_fused_vision_backbone": True,
    "timm_model_ids": ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"],
    "image_sizes": [224, 224], "torch_dtype": "bfloat16",
    "text_config": {"model_type": "mistral", "num_hidden_layers": 36, "vocab_size": 32064},
}  # fmt: skip


def recognizer(audio: tuple[int, ...], text: tuple[int, int]) -> dict[str, Any]:
    names = ("d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim")
    return {
        "model_type": "qwen3_asr",
        "thinker_config": {
            "dtype": "bfloat16",
            "audio_token_id": 151676,
            "audio_start_token_id": 151669,
            "audio_end_token_id": 151670,
            "audio_config": {
                **dict(zip(names, audio, strict=True)), "output_dim": text[0], "num_mel_bins": 128,
                "downsample_hidden_size": 480, "n_window": 50, "n_window_infer": 800,
                "max_source_positions": 1500,
            },
            "text_config": {
                "hidden_size": text[0], "intermediate_size": text[1], "num_hidden_layers": 28,
                "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
                "vocab_size": 151936, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
                "tie_word_embeddings": True, "max_position_embeddings": 65536,
            },
        },
    }  # fmt: skip


# configuration, bits, bytes that the published files have
PUBLISHED = {
    "GLM-4.5-Air": (AIR, 3, 43.6 * 2**30, 0.05 * 2**30),
    "Moxin-7B-VLM": (MOXIN, 8, 10.3e9, 0.05e9),
    "Qwen3-ASR-0.6B": (recognizer((896, 18, 14, 3584), (1024, 3072)), 8, 1.01e9, 0.005e9),
    "Qwen3-ASR-1.7B": (recognizer((1024, 24, 16, 4096), (2048, 6144)), 8, 2.46e9, 0.005e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_models(tmp_path, capsys, name):
    """By calculation: from config.json alone, in no memory."""
    settings, bits, size, slack = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    table = convert(tmp_path, quantize=True, q_bits=bits, dry_run=True)
    assert abs(table.bytes - size) <= slack
    assert mx.get_peak_memory() - before < 2**20
    assert f"{table.bytes / 1e9:.2f} GB" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("name", OPTIONS)
def test_a_dry_run_says_what_is_written(tmp_path, monkeypatch, name, capsys):
    monkeypatch.chdir(tmp_path)
    source = checkpoint(tmp_path / "source", num_hidden_layers=9)
    told = convert(source, "small", **OPTIONS[name], dry_run=True)
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.json").write_bytes((source / "config.json").read_bytes())
    alone = convert(tmp_path / "alone", "small", **OPTIONS[name], dry_run=True)
    assert not (tmp_path / "small").exists()
    capsys.readouterr()
    table = convert(source, "small", **OPTIONS[name])
    assert set(told.rows) == set(alone.rows) == set(table.rows)
    assert table.bytes == sum(value.nbytes for value in stored(tmp_path / "small").values())
    out = capsys.readouterr().out
    assert str(table) in out and f"with {table.bits_per_weight:.3f} bits per weight" in out
    expected = json.loads((tmp_path / "small" / INDEX).read_text())["metadata"]
    assert (expected["total_size"], expected["total_parameters"]) == (table.bytes, table.parameters)


# --- refusals and the command -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"quantize": True, "dequantize": True}, "exclude each other"),
        ({"dtype": "int8"}, "dtype must be one of float16, bfloat16, float32, got 'int8'"),
        ({"q_bits": 4}, "need quantize"),
        ({"vision": True}, "need quantize"),
        ({"quantize": True, "q_mode": "mxfp8", "quant_predicate": "mixed_3_6"}, "needs q_mode"),
        ({"quantize": True, "q_mode": "mxfp8", "q_bits": 4}, "bits must be one of 8"),
        ({"quantize": True, "quant_predicate": "mixed_1_2"}, "recipe must be one of"),
        ({"dequantize": True}, "the model is not quantized"),
    ],
)
def test_refusals(tmp_path, options, said):
    source = checkpoint(tmp_path / "source")
    with pytest.raises(ValueError, match=said):
        convert(source, tmp_path / "target", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_weight_that_is_not_finite_stops_it(tmp_path):
    weights = published(new_model(CONFIG))
    weights["model.layers.2.mlp.experts.4.up_proj.weight"][3, 9] = float("nan")
    write(tmp_path / "source", weights, CONFIG)
    with pytest.raises(ValueError, match=r"'model.layers.2.mlp.switch_mlp.up_proj.weight': a NaN"):
        convert(tmp_path / "source", tmp_path / "target", quantize=True)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    source = str(checkpoint(tmp_path / "source"))
    assert module.main(["--hf-path", source, "-q", "--q-bits", "3"]) == 0
    assert "[INFO] Quantized model with" in capsys.readouterr().out
    assert settings_of(tmp_path / "mlx_model")["quantization"]["bits"] == 3
    assert module.main(["--model", source, "-q"]) == 1
    assert "mlx_model: already exists" in capsys.readouterr().err
    assert module.main(["--model", str(tmp_path / "none"), "--mlx-path", "other"]) == 1
    assert capsys.readouterr().err.endswith("none: no such directory\n")


def test_the_options_of_mlx_lm():
    from mlx_lm.convert import configure_parser

    theirs = {flag for action in configure_parser()._actions for flag in action.option_strings}
    ours = {flag for action in module.setup_arg_parser()._actions for flag in action.option_strings}
    assert theirs <= ours


def test_upload(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    asked: list[Any] = []

    class Api:
        def create_repo(self, **named: Any) -> None:
            asked.append(("create", named))

        def upload_large_folder(self, **named: Any) -> None:
            assert (Path(named["folder_path"]) / "config.json").is_file()
            asked.append(("upload", named))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    source = checkpoint(tmp_path / "source")
    convert(source, tmp_path / "a", quantize=True, upload_repo="me/model", dry_run=True)
    assert not asked
    convert(source, tmp_path / "a", quantize=True, upload_repo="me/model")
    assert [(what, named["repo_id"]) for what, named in asked] == [
        ("create", "me/model"),
        ("upload", "me/model"),
    ]
