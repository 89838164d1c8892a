"""mlx_lowbit.generate: prompts, streaming, limits, and the command."""

from __future__ import annotations

import importlib
import sys
import types

import mlx.core as mx
import numpy as np
import pytest
from mlx_lowbit import accelerate

pytest.importorskip("mlx_lm")
pytest.importorskip("transformers")

import tiny_tokenizer

# The package shows functions of these names.
command = importlib.import_module("mlx_lowbit.generate")
mlx_lm_generate = importlib.import_module("mlx_lm.generate")
END = tiny_tokenizer.SPECIAL.index("</s>") + 256


@pytest.fixture(scope="module")
def model():
    from mlx_lm.models.llama import Model, ModelArgs

    mx.random.seed(1)
    args = ModelArgs(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        rms_norm_eps=1e-5,
        vocab_size=tiny_tokenizer.VOCABULARY,
        max_position_embeddings=64,
    )
    made = Model(args)
    mx.eval(made.parameters())
    accelerate(made)
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer.wrapped()


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens)


def test_prompts_take_the_chat_template(tokenizer):
    tokens = command.prompt_tokens(tokenizer, "hi", system="be brief", thinking=False)
    assert text_of(tokenizer, tokens) == "<system>be brief</s><user>hi</s><assistant><no>"
    tokens = command.prompt_tokens(tokenizer, "hi", thinking=True)
    assert text_of(tokenizer, tokens) == "<user>hi</s><assistant>"
    assert command.prompt_tokens(tokenizer, "hi", chat_template=False) == list(
        tokenizer.encode("hi")
    )


def test_what_a_plain_tokenizer_cannot_do_is_refused():
    plain = tiny_tokenizer.wrapped(template=None)
    assert text_of(plain, command.prompt_tokens(plain, "hi")) == "hi"
    with pytest.raises(ValueError, match="chat template"):
        command.prompt_tokens(plain, "hi", system="be brief")
    with pytest.raises(ValueError, match="empty"):
        command.prompt_tokens(plain, "")


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ raise_exception('no words') }}", "{{ 'a' + none }}"]
)
def test_a_template_that_fails_is_named(template):
    with pytest.raises(ValueError, match=r"^the chat template: \S"):
        command.prompt_tokens(tiny_tokenizer.wrapped(template=template), "hi")


def test_settings_of_a_template_do_not_replace_what_is_asked_for(tokenizer):
    tokens = command.prompt_tokens(tokenizer, "hi", tokenize=False, add_generation_prompt=False)
    assert tokens == command.prompt_tokens(tokenizer, "hi")


def greedy(model, tokens, count):
    for _ in range(count):
        tokens = [*tokens, mx.argmax(model(mx.array([tokens]))[0, -1]).item()]
    return tokens[-count:]


def test_tokens_are_the_likeliest(model, tokenizer):
    prompt = command.prompt_tokens(tokenizer, "hello")
    responses = list(command.stream_generate(model, tokenizer, prompt, max_tokens=12))
    want = greedy(model, prompt, 12)
    want = want[: want.index(END) + 1] if END in want else want
    assert [r.token for r in responses] == want
    assert responses[-1].prompt_tokens == len(prompt)
    assert command.generate(model, tokenizer, prompt, max_tokens=12) == "".join(
        r.text for r in responses
    )


def test_a_quantized_cache_is_passed_on(model, tokenizer, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        mlx_lm_generate, "stream_generate", lambda *a, **k: iter([seen.update(k)][:0])
    )
    list(command.stream_generate(model, tokenizer, "a", kv_bits=8, kv_group_size=32))
    assert seen["kv_bits"] == 8 and seen["kv_group_size"] == 32


@pytest.fixture
def one_token(model, tokenizer, monkeypatch):
    """Makes a token with these settings of the cache."""
    monkeypatch.setattr(model.args, "head_dim", 32)
    return lambda **settings: list(
        command.stream_generate(model, tokenizer, "a", max_tokens=1, **settings)
    )


def test_a_quantized_cache_that_mlx_lm_would_fail_to_make(one_token):
    with pytest.raises(ValueError, match="divide the 32 dimensions of a head, got 64"):
        one_token(kv_bits=8)
    assert one_token(max_kv_size=9)


@pytest.mark.cpu  # on CUDA MLX has no product of a slice of such a cache
def test_quantized_caches(one_token):
    assert one_token(kv_bits=8, kv_group_size=32, max_kv_size=9), "this model makes its own caches"
    assert one_token(kv_bits=8, kv_group_size=32, quantized_kv_start=0)


@pytest.mark.parametrize("count, error", [(65, "65 tokens.*64"), (0, None)])
def test_prompts_longer_than_the_context_are_refused(model, tokenizer, count, error):
    if error:
        with pytest.raises(ValueError, match=error):
            list(command.stream_generate(model, tokenizer, [3] * count))
    with pytest.raises(ValueError, match="max_tokens"):
        list(command.stream_generate(model, tokenizer, [3], max_tokens=0))


def test_prompts_of_ids(model, tokenizer):
    want = command.generate(model, tokenizer, [3, 1, 4], max_tokens=2)
    for ids in ((3, 1, 4), np.array([3, 1, 4]), mx.array([3, 1, 4])):
        assert command.generate(model, tokenizer, ids, max_tokens=2) == want
    for nothing in ("", [], np.array([], np.int64)):
        with pytest.raises(ValueError, match="the prompt is empty"):
            command.generate(model, tokenizer, nothing)
    for wrong in (None, 3, [1.5], [[1, 2]]):
        with pytest.raises(TypeError, match=r"^prompt: expected text or whole numbers"):
            command.generate(model, tokenizer, wrong)
    with pytest.raises(ValueError, match=r"^prompt: expected ids of tokens, got -2"):
        command.generate(model, tokenizer, [1, -2])


@pytest.fixture
def loaded(model, tokenizer, monkeypatch):
    """What the command hands to `load`, which returns the model of this file."""
    calls = []

    def load(path, **keywords):
        calls.append((path, keywords))
        if path == "missing":
            raise FileNotFoundError("missing: no such\ndirectory")
        return model, tokenizer

    module = types.SimpleNamespace(load=load)
    monkeypatch.setitem(sys.modules, "mlx_lowbit.load", module)
    return calls


def test_the_command_prints_text_and_statistics(loaded, capsys):
    assert command.main(["--model", "m", "-p", "hello", "-m", "5", "-qa", "--q-bits", "3"]) == 0
    assert loaded == [
        ("m", {"quantize_activations": True, "bits": 3, "mode": None, "group_size": None})
    ]
    text = capsys.readouterr().out
    assert "==========\nPrompt: " in text and "tokens-per-sec\nPeak memory: " in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "missing"], "missing: no such directory"),
        (["--model", "m", "-p", "x" * 65, "--ignore-chat-template"], "positions for 64"),
        (["--model", "m", "-m", "0"], "max_tokens"),
        (["--model", "m", "-p", "", "--ignore-chat-template"], "empty"),
        (["--model", "m", "--seed", "-1"], "seed must be between 0 and"),
        (["--model", "m", "--seed", str(2**64)], "seed must be between 0 and"),
        (["--model", "m", "--temp", "nan"], "temp must be at least 0 and finite"),
        (["--model", "m", "--temp", "inf"], "temp must be at least 0 and finite"),
        (["--model", "m", "--min-p", "2"], "min_p must be between 0 and 1"),
        (["--model", "m", "--top-k", "-1"], "top_k must be at least 0"),
        (["--model", "m", "--top-k", "262"], "top_k must be below the 262 tokens"),
        (["--model", "m", "--kv-bits", "7"], "kv_bits must be 2, 3, 4, 5, 6 or 8"),
        (["--model", "m", "--kv-bits", "0"], "kv_bits must be 2, 3, 4, 5, 6 or 8"),
        (["--model", "m", "--kv-group-size", "48"], "kv_group_size must be 32, 64 or 128"),
        (["--model", "m", "--quantized-kv-start", "-1"], "quantized_kv_start must be at least 0"),
        (["--model", "m", "--max-kv-size", "0"], "max_kv_size must be at least 1"),
        (["--model", "m", "--prefill-step-size", "0"], "prefill_step_size must be at least 1"),
    ],
)
def test_errors_are_one_line_and_status_1(loaded, capsys, arguments, message):
    assert command.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("mlx_lowbit.generate: ") and message in err
    assert err.count("\n") == 1


def test_ctrl_c_ends_with_what_there_is(capsys, model, tokenizer):
    def interrupted():
        yield from command.stream_generate(model, tokenizer, "ab", max_tokens=2)
        raise KeyboardInterrupt

    assert command.show(interrupted()) == 130
    assert "Generation: " in capsys.readouterr().out


def test_a_prompt_comes_from_standard_input(loaded, monkeypatch, capsys):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("q" * 65))
    assert command.main(["--model", "m", "-p", "-", "--ignore-chat-template"]) == 1
    assert "65 tokens" in capsys.readouterr().err
