"""Loading: plain, quantized and foreign checkpoints, quantization on the way, what is refused."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as mlx_nn
import mlx_lowbit
import pytest
from checkpoint_values import (
    BIAS,
    ROUTER,
    assert_same,
    checkpoint,
    config,
    need_global_scales_of_experts,
    new_model,
    parameters,
    published,
    write,
)
from mlx_lowbit import memory
from mlx_lowbit.formats import FORMATS
from mlx_lowbit.load import ORIGIN, load
from mlx_lowbit.nn.layer import LowbitLayer

pytest.importorskip("mlx_lm")
pytest.importorskip("transformers")

STORED = [f for f in FORMATS if f.judged or f.mode == "mxfp4"]
EXPERTS = "model.layers.1.mlp.switch_mlp.up_proj"
VALUE = "model.layers.2.self_attn.v_proj"


def layer(model: mlx_nn.Module, path: str) -> Any:
    return dict(model.named_modules())[path]


def quantized(directory: Path, block: dict[str, Any], left: tuple[str, ...] = ()) -> Path:
    """A checkpoint stored as `block` says, with the layers in `left` unquantized."""
    settings = config()
    model = new_model(settings)
    default = {k: v for k, v in block.items() if k in ("bits", "group_size", "mode")}

    def predicate(path: str, module: mlx_nn.Module) -> bool | dict[str, Any]:
        if path in left or not hasattr(module, "to_quantized"):
            return False
        return block.get(path, {"mode": "affine"} | default)

    mlx_nn.quantize(model, class_predicate=predicate)
    return write(directory, parameters(model), settings | {"quantization": block})


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("index", [True, False])
def test_a_published_checkpoint(tmp_path, shards, index):
    settings = config()
    model = new_model(settings)
    loaded, tokenizer = load(
        write(tmp_path, published(model), settings, shards=shards, index=index)
    )
    assert_same(loaded, model)
    assert not loaded.training
    ours = mx.default_device().type == mx.cpu  # a GPU has MLX's dense products
    assert isinstance(layer(loaded, VALUE), mlx_lowbit.nn.Linear) == ours
    assert tokenizer.decode(tokenizer.encode("words")) == "words"
    assert tokenizer.eos_token_ids == {257}


@pytest.mark.parametrize("stored", STORED, ids=lambda f: f.name)
def test_quantized_while_loading(tmp_path, stored):
    """Bit for bit what MLX makes of the same weights, in our layers."""
    model = new_model(config())
    path = write(tmp_path, published(model), config(), shards=2)
    loaded, _ = load(path, bits=stored.bits, mode=stored.mode, group_size=stored.group_size)

    def fits(_: str, module: mlx_nn.Module) -> bool:
        columns = module.weight.shape[-1] if hasattr(module, "to_quantized") else 1
        return columns % stored.group_size == 0

    mlx_nn.quantize(model, stored.group_size, stored.bits, mode=stored.mode, class_predicate=fits)
    assert_same(loaded, model)
    for name in (EXPERTS, VALUE, "lm_head", "model.embed_tokens"):  # of 128 columns
        own = layer(loaded, name)
        assert isinstance(own, LowbitLayer)
        assert all(getattr(own, n) == getattr(stored, n) for n in ("mode", "bits", "group_size"))
    assert parameters(loaded)[ROUTER].dtype == mx.bfloat16
    assert parameters(loaded)[BIAS].dtype == mx.float32


@pytest.mark.parametrize(("asked", "bits"), [({"bits": 3}, 3), ({"mode": "nvfp4"}, 4)])
def test_defaults_of_the_mode(tmp_path, asked, bits):
    loaded, _ = load(checkpoint(tmp_path), **asked)
    assert loaded.lm_head.bits == bits


BLOCKS = {
    "plain": {"group_size": 64, "bits": 4, "mode": "affine"},
    "without a mode": {"group_size": 32, "bits": 8},
    "null": {"group_size": None, "bits": None, "mode": "mxfp8"},
    "paths": {
        "group_size": 64,
        "bits": 3,
        "mode": "affine",
        VALUE: {"group_size": 64, "bits": 6, "mode": "affine"},
        EXPERTS: {"group_size": 32, "bits": 4},
        "lm_head": {"group_size": None, "bits": 8, "mode": "affine"},
        "model.embed_tokens": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        "model.layers.0.mlp.down_proj": False,
    },
}


@pytest.mark.parametrize("name", BLOCKS)
def test_quantized_checkpoints(tmp_path, name):
    import mlx_lm

    left = tuple(path for path, value in BLOCKS[name].items() if value is False)
    path = quantized(tmp_path, BLOCKS[name], left)
    loaded, _ = load(path)
    stored = {n: v for file in path.glob("*.safetensors") for n, v in mx.load(str(file)).items()}
    assert_same(loaded, stored)
    kept = {p for p, m in loaded.named_modules() if isinstance(m, mlx_nn.Linear)}
    assert kept == set(left)
    if name != "null":  # which mlx-lm writes, and cannot read at the top
        theirs, _ = mlx_lm.load(str(path))
        assert_same(loaded, theirs)


def test_only_layers_with_scales_are_quantized(tmp_path):
    left = (VALUE, EXPERTS, "model.embed_tokens")
    loaded, _ = load(quantized(tmp_path, BLOCKS["plain"], left))
    for path in left:
        assert "scales" not in layer(loaded, path)
    assert loaded.lm_head.bits == 4


def test_a_layer_that_is_not_named_and_does_not_fit_the_default(tmp_path):
    """As in mlx-lm: shapes and dtypes allow one format only."""
    mixed = BLOCKS["plain"] | {VALUE: {"group_size": 32, "bits": 3, "mode": "affine"}}
    mixed |= {EXPERTS: {"group_size": 32, "bits": 8, "mode": "mxfp8"}}
    path = quantized(tmp_path, mixed)
    settings = json.loads((path / "config.json").read_text())
    settings["quantization"] = BLOCKS["plain"]
    (path / "config.json").write_text(json.dumps(settings))
    loaded, _ = load(path)
    assert (layer(loaded, VALUE).bits, layer(loaded, VALUE).group_size) == (3, 32)
    assert layer(loaded, EXPERTS).mode == "mxfp8"


def test_a_named_layer_that_is_not_there_is_warned_of(tmp_path):
    block = BLOCKS["plain"] | {"model.layers.9.mlp.up_proj": {"bits": 8, "group_size": 64}}
    with pytest.warns(UserWarning, match=r"model\.layers\.9\.mlp\.up_proj: the model has no such"):
        load(quantized(tmp_path, block))


def test_a_global_scale_for_each_expert(tmp_path):
    need_global_scales_of_experts()
    settings = config()
    model = new_model(settings)
    block: dict[str, Any] = {"group_size": 16, "bits": 4, "mode": "nvfp4"}
    mlx_nn.quantize(
        model,
        class_predicate=lambda p, m: (
            hasattr(m, "to_quantized") and block | ({"global_scale": True} if "switch" in p else {})
        ),
    )
    path = write(tmp_path, parameters(model), settings | {"quantization": block})
    loaded, _ = load(path)
    assert_same(loaded, model)
    assert parameters(loaded)[f"{EXPERTS}.global_scale"].shape == (8,)


def test_a_checkpoint_of_another_tool_goes_through_mlx_lm(tmp_path):
    settings = config()
    model = new_model(settings)
    mlx_nn.quantize(model, 32, 4, mode="mxfp4")
    block = {"quantization_config": {"quant_method": "mxfp4"}}
    path = write(tmp_path, parameters(model), settings | block)
    loaded, _ = load(path)
    assert_same(loaded, model)
    assert isinstance(layer(loaded, EXPERTS), LowbitLayer)
    with pytest.raises(ValueError, match="quantized by mxfp4"):
        load(path, bits=4)


def test_models_of_mlx_lm(tmp_path):
    import mlx_lm
    from mlx_lm.models import llama

    settings = {
        "model_type": "llama",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 300,
        "tie_word_embeddings": True,
    }
    model = llama.Model(llama.ModelArgs.from_dict(settings))
    path = write(tmp_path, parameters(model), settings)
    theirs, _ = mlx_lm.load(str(path))
    loaded, _ = load(path)
    assert_same(loaded, theirs)
    loaded, _ = load(path, bits=4, group_size=32)
    assert isinstance(loaded.model.layers[0].mlp.up_proj, mlx_lowbit.nn.QuantizedLinear)


def test_lazy(tmp_path):
    path = checkpoint(tmp_path)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    lazy, _ = load(path, bits=4, lazy=True)
    assert mx.get_peak_memory() - before < 10_000
    eager, _ = load(path, bits=4)
    assert_same(lazy, eager)


@pytest.mark.parametrize("mode", ["affine", "mxfp8"])
def test_memory_while_quantizing(tmp_path, mode):
    """At most the quantized model and two layers of the source."""
    path = checkpoint(
        tmp_path,
        num_hidden_layers=8,
        hidden_size=256,
        moe_intermediate_size=512,
    )
    mx.synchronize()
    before = memory.get_active_memory()
    memory.reset_peak_memory()
    model, _ = load(path, mode=mode)
    mx.synchronize()
    peak, held = memory.get_peak_memory() - before, memory.get_active_memory() - before
    size = sum(value.nbytes for value in parameters(model).values())
    source = (path / "model.safetensors").stat().st_size / 8
    assert size <= held <= size + 200_000
    assert peak <= size + 2 * source < 0.8 * 8 * source


# --- quantized activations ----------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["mxfp8", "nvfp4"])
def test_quantized_activations(tmp_path, mode):
    """Biased layers and experts too; embeddings stay weight-only."""
    path = checkpoint(tmp_path)
    weight_only, _ = load(path, mode=mode)
    model, _ = load(path, mode=mode, quantize_activations=True)
    assert_same(model, weight_only)
    assert isinstance(layer(model, VALUE), mlx_lowbit.nn.QQLinear) and "bias" in layer(model, VALUE)
    assert isinstance(layer(model, EXPERTS), mlx_lowbit.nn.QQSwitchLinear)
    assert isinstance(model.model.embed_tokens, mlx_lowbit.nn.QuantizedEmbedding)
    assert isinstance(layer(weight_only, VALUE), mlx_lowbit.nn.QuantizedLinear)
    assert not isinstance(layer(weight_only, VALUE), mlx_lowbit.nn.QQLinear)
    tokens = mx.array([[1, 2, 3]])
    assert not mx.array_equal(model(tokens), weight_only(tokens)).item()


def test_quantized_activations_are_refused(tmp_path):
    path = checkpoint(tmp_path)
    with pytest.raises(ValueError, match="the model is not quantized"):
        load(path, quantize_activations=True)
    with pytest.raises(ValueError, match=r"q_proj: QuantizedLinear is in mode 'affine'") as error:
        load(path, bits=4, quantize_activations=True)
    assert "skip_unsupported" not in str(error.value)


# --- sources ------------------------------------------------------------------------------------


def test_a_local_directory_never_touches_the_network(tmp_path, monkeypatch):
    path = checkpoint(tmp_path)
    asked: list[Any] = []

    def refuse(*address: Any, **named: Any) -> None:
        asked.append(address)
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    load(path, bits=4)
    load(str(path))
    assert asked == []


def test_a_repository_of_the_hub(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    path = checkpoint(tmp_path / "cache")
    asked: list[Any] = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda name, **named: (asked.append((name, named)), str(path))[1],
    )
    monkeypatch.chdir(tmp_path)
    model, _ = load("owner/a-model", revision="main")
    (name, named), source = asked[0], vars(model)[ORIGIN].source
    assert (name, named["revision"]) == ("owner/a-model", "main")
    assert "*.safetensors" in named["allow_patterns"]
    assert (source.repository, source.directory) == ("owner/a-model", path)


def test_no_such_source(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")

    def fail(name: str, **named: Any) -> str:
        raise RuntimeError("404\nand more lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^owner/none: .*: 404$"):
        load("owner/none")
    for name in ("/no/such", "./none", "~/none-at-all", "a/b/c", "../x", Path("owner/none")):
        with pytest.raises(FileNotFoundError, match=r"no such directory$"):
            load(name)
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="got a file"):
        load("file")


def test_a_model_that_brings_its_own_file(tmp_path):
    path = checkpoint(tmp_path)
    settings = json.loads((path / "config.json").read_text()) | {"model_file": "own.py"}
    (path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"'own.py', which is only run with trust_remote_code"):
        load(path)
    with pytest.raises(FileNotFoundError, match=r"own.py: no such file"):
        load(path, trust_remote_code=True)
    (path / "own.py").write_text("from mlx_lowbit.models.glm4_moe import Model, ModelArgs\n")
    model, _ = load(path, trust_remote_code=True)
    assert isinstance(layer(model, EXPERTS), mlx_nn.Module)


# --- tokenizers ---------------------------------------------------------------------------------


def test_end_tokens_of_the_generation_config(tmp_path):
    path = checkpoint(tmp_path)
    (path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    _, tokenizer = load(path)
    assert {5, 6} <= tokenizer.eos_token_ids


def test_tokenizers_that_do_not_fit(tmp_path):
    path = checkpoint(tmp_path, vocab_size=100)
    with pytest.raises(ValueError, match=r"the tokenizer has .* tokens, the model 100"):
        load(path)
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^{path}: the tokenizer cannot be read"):
        load(path)
    for file in path.glob("token*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        load(path)


# --- what is refused ----------------------------------------------------------------------------


def test_quantizing_what_is_quantized(tmp_path):
    with pytest.raises(ValueError, match=r"quantized already \(affine 4-bit, groups of 64\)"):
        load(quantized(tmp_path, BLOCKS["plain"]), bits=8)


@pytest.mark.parametrize(
    ("asked", "argument"),
    [
        ({"bits": 7}, "bits"),
        ({"bits": "4"}, "bits"),
        ({"mode": "int8"}, "mode"),
        ({"mode": 4}, "mode"),
        ({"group_size": 256}, "group_size"),
        ({"mode": "mxfp8", "group_size": 64}, "group_size"),
    ],
)
def test_an_unknown_format(tmp_path, asked, argument):
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        load(tmp_path, **asked)


@pytest.mark.parametrize("mode", ["affine", "nvfp4", "mxfp8"])
def test_a_weight_that_is_not_finite_is_named(tmp_path, mode):
    weights = published(new_model(config()))
    name = "model.layers.2.self_attn.o_proj.weight"
    weights[name][7, 3] = float("inf" if mode == "nvfp4" else "nan")
    with pytest.raises(ValueError, match=f"'{name}': a NaN or an infinity in row 7"):
        load(write(tmp_path, weights, config()), mode=mode)


def test_a_bar_while_quantizing(tmp_path, capsys):
    path = checkpoint(tmp_path)
    load(path, bits=4, progress=True)
    assert "Quantizing: 100%" in capsys.readouterr().err
    load(path, bits=4, progress=False)
    load(path, progress=True)
    assert "Quantizing" not in capsys.readouterr().err
