"""Models of mlx-lm before and after accelerate: logits, generation, files, LoRA, its own tools."""

from __future__ import annotations

import copy
import importlib.metadata
import json

import mlx.core as mx
import mlx.nn as mlx_nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten
from mlx_lowbit import accelerate, nn, quantize_activations, undo

pytest.importorskip("mlx_lm")

SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
LLAMA = {"model_type": "llama", "tie_word_embeddings": False, **SHAPE}
MIXTURE = {
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "head_dim": 32,
    **SHAPE,
}
QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    **MIXTURE,
}
GLM4_MOE = {
    "model_type": "glm4_moe",
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
    "rope_scaling": None,
    "use_qk_norm": True,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    **MIXTURE,
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "first_k_dense_replace": 1,
    **MIXTURE,
}
AFM7 = {
    "model_type": "afm7",
    "vocab_size": 160,
    "hidden_dim": 128,
    "num_layers": 2,
    "num_kv_reuse_layers": 1,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_dim_scale_factor": 2.0,
}
# More than 64 choices of experts: mlx-lm then sorts the tokens by expert.
PROMPTS = [mx.array([[7, 3, 150, 9]]), mx.arange(40)[None] * 3 % 160]
LORA = {"rank": 4, "scale": 2.0, "dropout": 0.0}


def build(config, seed=11):
    """A float32 model with random weights, its biases and routers included."""
    from mlx_lm.utils import _get_classes

    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    spread = {"bias": 0.1, "e_score_correction_bias": 0.1, "gate.weight": 0.2}

    def fill(path, value):
        for ending, scale in spread.items():
            if path.endswith(ending) and not value.any():
                return mx.random.normal(value.shape, scale=scale).astype(value.dtype)
        return value

    model.update(tree_map_with_path(fill, model.parameters()))
    return model.eval()


def quantize(model, fmt):
    mlx_nn.quantize(
        model,
        group_size=fmt.group_size,
        bits=fmt.bits,
        mode=fmt.mode,
        class_predicate=lambda _, layer: (
            hasattr(layer, "to_quantized") and layer.weight.shape[-1] % fmt.group_size == 0
        ),
    )
    return model


def affine(config, seed=11):
    model = build(config, seed)
    # As keywords of each layer, since afm7's fused projections take no mode.
    settings = {"group_size": 32, "bits": 4}
    mlx_nn.quantize(
        model, class_predicate=lambda _, layer: hasattr(layer, "to_quantized") and dict(settings)
    )
    return model


def logits(model):
    return [np.array(model(prompt).astype(mx.float32)) for prompt in PROMPTS]


def keys(model):
    return [name for name, _ in tree_flatten(model.parameters())]


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def distance(first, second):
    """The largest relative difference between two lists of logits."""
    return max(
        float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(first, second, strict=True)
    )


def dequantized(model):
    """Logits of the same model with every quantized layer replaced by the floats it stands for."""
    from mlx_lm.utils import dequantize_model

    dense = dequantize_model(copy.deepcopy(model))
    dense.set_dtype(mx.float32)
    return logits(dense)


@pytest.mark.parametrize("config", [LLAMA, GLM4_MOE], ids=lambda c: c["model_type"])
def test_logits_in_every_format(judged_fmt, config):
    model = quantize(build(config), judged_fmt)
    # MLX's own product of 128 columns in groups of 128: cuGraphAddKernelNode, invalid argument.
    mlx_fails = judged_fmt.group_size == 128 and mx.default_device().type == mx.gpu
    before = None if mlx_fails else logits(model)
    names, reference = keys(model), dequantized(model)
    report = accelerate(model)
    assert report.left == [] and report.replaced
    swapped = {path: (kind, fmt) for path, kind, fmt in report.replaced}
    assert swapped["model.layers.1.self_attn.q_proj"] == ("QuantizedLinear", judged_fmt.name)
    assert swapped["model.embed_tokens"] == ("QuantizedEmbedding", judged_fmt.name)
    if config is GLM4_MOE:
        kind = ("QuantizedSwitchLinear", judged_fmt.name)
        assert swapped["model.layers.1.mlp.switch_mlp.down_proj"] == kind
        layer = model.model.layers[1].mlp.switch_mlp.up_proj
        assert type(layer) is nn.QuantizedSwitchLinear
    assert keys(model) == names
    # Scale modes decode the embedding to bfloat16, so the whole model runs in it.
    bound = 1e-4 if judged_fmt.mode == "affine" else 0.03
    assert distance(logits(model), reference) < bound
    undo(model)
    assert before is None or same(logits(model), before)


@pytest.mark.parametrize(
    "config", [LLAMA, QWEN3_MOE, GLM4_MOE, DEEPSEEK_V3, AFM7], ids=lambda c: c["model_type"]
)
def test_every_quantized_layer_of_the_architectures(config):
    model = affine(config)
    before, names = logits(model), keys(model)
    report = accelerate(model)
    assert report.left == [] and keys(model) == names
    assert distance(logits(model), before) < 1e-4
    ours = [layer for _, layer in model.named_modules() if "scales" in layer]
    assert len(ours) > 8
    assert all(isinstance(layer, nn.quantized.LowbitLayer) for layer in ours)
    undo(model)
    assert same(logits(model), before)


def test_latent_attention_and_fused_projections_are_covered():
    kinds = {path: kind for path, kind, _ in accelerate(affine(DEEPSEEK_V3)).replaced}
    assert kinds["model.layers.0.self_attn.embed_q"] == "QuantizedMultiLinear"
    assert kinds["model.layers.0.self_attn.unembed_out"] == "QuantizedMultiLinear"
    kinds = {path: kind for path, kind, _ in accelerate(affine(AFM7)).replaced}
    assert "FusedQuantizedLinear" in kinds.values()


def test_tied_embeddings():
    model = affine({**LLAMA, "tie_word_embeddings": True})
    before, reference = logits(model), dequantized(model)
    assert "lm_head" not in {path for path, _, _ in accelerate(model).replaced}
    assert type(model.model.embed_tokens) is nn.QuantizedEmbedding
    assert distance(logits(model), reference) < 1e-4
    undo(model)
    assert same(logits(model), before)


def test_unquantized_models(dtype):
    model = build(LLAMA)
    model.set_dtype(dtype)
    before = logits(model)
    ours = ["Linear"] * 15 if mx.default_device().type == mx.cpu else []
    assert [kind for _, kind, _ in accelerate(model).replaced] == ours
    assert distance(logits(model), before) < {mx.float32: 1e-5}.get(dtype, 0.03)
    undo(model)
    assert same(logits(model), before)


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_generation(kv_bits):
    from mlx_lm.generate import generate_step

    def tokens(model):
        steps = generate_step(PROMPTS[0][0], model, max_tokens=8, kv_bits=kv_bits, kv_group_size=32)
        return [int(token) for token, _ in steps]

    model = affine(LLAMA)
    before = tokens(model)
    accelerate(model)
    assert tokens(model) == before and len(before) == 8


def test_mlx_lms_own_figures(judged_fmt):
    from mlx_lm.utils import compute_bits_per_weight, get_total_parameters

    model = quantize(build(GLM4_MOE), judged_fmt)
    before = get_total_parameters(model), compute_bits_per_weight(model)
    accelerate(model)
    assert (get_total_parameters(model), compute_bits_per_weight(model)) == before


def save(model, config, path, **quantization):
    from mlx_lm.utils import save_model

    save_model(path, model)
    (path / "config.json").write_text(json.dumps({**config, "quantization": quantization}))


def test_saved_and_loaded_by_mlx_lm(tmp_path):
    from mlx_lm.utils import load_model

    model = affine(GLM4_MOE)
    before = logits(model)
    accelerate(model)
    save(model, GLM4_MOE, tmp_path, group_size=32, bits=4, mode="affine")
    loaded, _ = load_model(tmp_path)
    assert type(loaded.lm_head) is mlx_nn.QuantizedLinear and same(logits(loaded), before)
    ours = logits(model)
    accelerate(loaded)
    assert same(logits(loaded), ours)


def test_mlx_lms_activation_quantized_models(tmp_path, qq_fmt):
    from mlx_lm.utils import load_model

    model = quantize(build(LLAMA), qq_fmt)
    settings = {"group_size": qq_fmt.group_size, "bits": qq_fmt.bits, "mode": qq_fmt.mode}
    save(model, LLAMA, tmp_path, **settings)
    loaded, _ = load_model(tmp_path, model_config={"quantize_activations": True})
    assert type(loaded.lm_head) is mlx_nn.QQLinear
    report = accelerate(loaded)
    assert ("lm_head", "QQLinear", qq_fmt.name) in report.replaced and report.left == []
    quantize_activations(accelerated := copy.deepcopy(model))
    assert type(accelerated.lm_head) is nn.QQLinear
    accelerate(accelerated)
    assert same(logits(loaded), logits(accelerated))
    undo(loaded)
    assert type(loaded.lm_head) is mlx_nn.QQLinear


def test_activations_of_biased_layers_and_experts(qq_fmt):
    model = quantize(build(GLM4_MOE), qq_fmt)
    accelerate(model)
    before = logits(model)
    report = quantize_activations(model)
    kinds = {path: kind for path, kind, _ in report.replaced}
    assert kinds["model.layers.0.self_attn.q_proj"] == "QQLinear"
    assert kinds["model.layers.1.mlp.switch_mlp.up_proj"] == "QQSwitchLinear"
    assert "bias" in model.model.layers[0].self_attn.q_proj
    assert type(model.model.layers[1].mlp.switch_mlp.up_proj) is nn.QQSwitchLinear
    assert [path for path, _ in report.left] == ["model.embed_tokens"]
    assert 1e-4 < distance(logits(model), before) < 0.6


def with_lora(model, **keywords):
    """``model`` with LoRA on every layer that can take it; lora_b is zero."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(3)
    model.freeze()
    linear_to_lora_layers(model, 2, LORA, **keywords)
    return model


def adapted(model):
    """The same with lora_b filled, so that it matters."""

    def fill(path, value):
        return mx.random.normal(value.shape, scale=0.02) if path.endswith("lora_b") else value

    with_lora(model)
    model.update(tree_map_with_path(fill, model.parameters()))
    return model


def gradients(model):
    def loss(model):
        outputs = model(PROMPTS[1][:, :-1])
        return mlx_nn.losses.cross_entropy(outputs, PROMPTS[1][:, 1:], reduction="mean")

    return dict(tree_flatten(mlx_nn.value_and_grad(model, loss)(model)[1]))


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=lambda c: c["model_type"])
def test_lora(config):
    if config is QWEN3_MOE and importlib.metadata.version("mlx-lm").startswith("0.31."):
        pytest.skip("routers of mlx-lm 0.31 differentiate indices, which this MLX refuses")
    model = affine(config)
    accelerate(model)
    adapted(model)
    got, outputs = gradients(model), logits(model)
    assert got and all(name.split(".")[-1] in ("lora_a", "lora_b") for name in got)
    undo(model)
    expected = gradients(model)
    assert sorted(got) == sorted(expected)
    for name, value in expected.items():
        difference = mx.linalg.norm(got[name] - value) / mx.linalg.norm(value)
        assert difference < 1e-3, name
    assert distance(outputs, logits(model)) < 1e-4


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE], ids=lambda c: c["model_type"])
def test_lora_is_fused(config, dequantize):
    model = affine(config)
    stock = adapted(copy.deepcopy(model))
    accelerate(model)
    adapted(model)
    assert keys(model) == keys(stock)
    for each in (stock, model):
        fused = [(p, m.fuse(dequantize)) for p, m in each.named_modules() if hasattr(m, "fuse")]
        each.update_modules(tree_unflatten(fused))
    assert keys(model) == keys(stock)
    for (name, a), (_, b) in zip(
        tree_flatten(model.parameters()), tree_flatten(stock.parameters()), strict=True
    ):
        assert mx.array_equal(a, b), name
    accelerate(model)
    assert distance(logits(model), logits(stock)) < 1e-4


def test_lora_on_activation_quantized_layers(qq_fmt):
    model = quantize(build(LLAMA), qq_fmt)
    quantize_activations(model)
    before = logits(model)
    assert same(logits(with_lora(model)), before)
    assert all(mx.isfinite(value).all() for value in gradients(model).values())
    layer = model.model.layers[0].self_attn.q_proj
    weight = layer.fuse(dequantize=True).weight
    settings = {"mode": qq_fmt.mode, "bits": qq_fmt.bits, "group_size": qq_fmt.group_size}
    assert mx.array_equal(
        weight, mx.dequantize(layer.linear.weight, layer.linear.scales, **settings)
    )


def test_dora():
    model = affine(LLAMA)
    before = logits(model)
    accelerate(model)
    assert distance(logits(with_lora(model, use_dora=True)), before) < 1e-4


def test_learned_quantization_trains_scales_and_biases():
    """mlx_lm.quant.dwq unfreezes scales and biases of every layer with a ``bits`` attribute."""
    model = affine(LLAMA)
    grads = []
    for change in (undo, accelerate):
        change(model)
        model.freeze()
        for _, layer in model.named_modules():
            if hasattr(layer, "bits") and hasattr(layer, "group_size"):
                layer.unfreeze(keys=["scales", "biases"], recurse=False)
        grads.append(gradients(model))
    assert sorted(grads[0]) == sorted(grads[1]) and len(grads[0]) == 32
    for name, value in grads[0].items():
        assert mx.linalg.norm(grads[1][name] - value) < 1e-3 * mx.linalg.norm(value), name
