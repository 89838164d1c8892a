"""The trained model that ships with the package, and the demo on a model of a few weights."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx_lowbit
import numpy as np
import oracle
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lowbit import demo, demo_model
from mlx_lowbit.demo_model import measure, reference

mlx_lm = pytest.importorskip("mlx_lm")

TINY = demo.Workload(
    hidden_size=256,
    intermediate_size=128,
    layers=1,
    prompt_tokens=4,
    tokens_before=2,
    tokens_after=3,
    windows=2,
    context=32,
    sample_tokens=8,
)
TEXT = "    def __init__(self, name=None):\n        self.name = "
END_TEXT = "<|endoffile|>"


@pytest.fixture(scope="module")
def trained():
    """(model, tokenizer) as mlx-lm loads them, in bfloat16; no test changes the model."""
    return mlx_lm.load(str(demo_model.DIRECTORY))


@pytest.fixture(scope="module")
def windows():
    """int64 [8, 129] of held-out sources."""
    stream = demo_model.token_stream(demo_model.held_out_files())
    return demo_model.even_windows(stream, count=8, context=128)


@pytest.fixture(scope="module")
def pair_perplexity(windows):
    """Perplexity on the windows of byte pairs counted, plus one, in the sources trained on."""
    files = demo_model.library_files(held_out=False)
    seen, size = demo_model.token_stream(files), demo_model.VOCABULARY
    counts = np.bincount(seen[:-1] * size + seen[1:], minlength=size * size).reshape(size, size) + 1
    chances = counts / counts.sum(axis=1, keepdims=True)
    return math.exp(-np.log(chances[windows[:, :-1], windows[:, 1:]]).mean())


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    """An empty directory in which every temporary directory is made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


# --- the tokenizer and the text --------------------------------------------------------------


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
@example(
    text="na\u00efve \u0100\u0120\u010a \u6f22\u5b57 \U0001f642 \x00\x7f\u200b\r\n\t ,b \u202e"
)
@example(text="  two  spaces , a comma .  ")
@example(text="e\u0301 \u00e9 \ufb01 \u212b")  # normalization would change these
def test_tokens_are_the_bytes_of_any_text(trained, text):
    tokenizer = trained[1]
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_end_of_file_is_one_token_that_no_byte_is(trained):
    tokenizer = trained[1]
    assert tokenizer.encode(END_TEXT) == [demo_model.END_OF_FILE]
    assert tokenizer.eos_token_ids == {demo_model.END_OF_FILE}


def test_held_out_files_are_not_among_those_trained_on():
    root = demo_model.library_root()
    held_out = {path.relative_to(root).as_posix() for path in demo_model.held_out_files()}
    trained_on = demo_model.library_files(held_out=False)
    assert held_out and all(map(demo_model.is_held_out, held_out))
    assert held_out.isdisjoint(path.relative_to(root).as_posix() for path in trained_on)
    assert len(trained_on) > 4 * len(held_out)


def test_library_without_sources_is_refused(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").write_text("pass")
    with pytest.raises(
        FileNotFoundError, match=r"root: expected Python sources below .*, got none"
    ):
        demo_model.library_files(held_out=True, root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"root: expected some of .* got none"):
        demo_model.held_out_files(root=tmp_path)


def test_token_stream_ends_each_file(tmp_path):
    files = [tmp_path / "a.py", tmp_path / "b.py"]
    files[0].write_bytes(b"\x00\xff")
    files[1].write_bytes(b"")
    assert demo_model.token_stream(files).tolist() == [0, 255, 256, 256]


def test_even_windows_reach_from_the_first_token_to_the_last():
    stream = np.arange(100)
    rows = demo_model.even_windows(stream, count=4, context=9)
    assert rows.shape == (4, 10)
    assert rows[0, 0] == 0 and rows[-1, -1] == 99
    assert (np.diff(rows, axis=1) == 1).all()
    assert len(demo_model.even_windows(stream, count=1000, context=9)) == 10


@pytest.mark.parametrize(
    ("length", "count", "context", "message"),
    [
        (5, 1, 5, "stream: expected at least 6 tokens, got 5"),
        (9, 0, 3, "got 0, 3"),
        (9, 1, 0, "got 1, 0"),
    ],
)
def test_windows_that_do_not_fit_are_refused(length, count, context, message):
    with pytest.raises(ValueError, match=message):
        demo_model.even_windows(np.arange(length), count=count, context=context)


# --- the trained model -----------------------------------------------------------------------


def test_model_is_small_and_every_group_size_divides_it(trained):
    model, _ = trained
    assert measure.weight_bytes(model) < 3e6
    widths = {value.shape[-1] for _, value in tree_flatten(model.parameters()) if value.ndim == 2}
    assert all(width % 128 == 0 for width in widths)


def test_perplexity_is_below_that_of_byte_pairs(judged_fmt, windows, pair_perplexity):
    with measure.quantized_copy(demo_model.DIRECTORY, judged_fmt) as (model, _, _):
        report = mlx_lowbit.accelerate(model)
        assert report.replaced and not report.left
        assert 1 < measure.perplexity(model, windows) < pair_perplexity


def test_perplexity_of_a_uniform_model_is_the_vocabulary(windows):
    def uniform(tokens):
        return mx.zeros((*tokens.shape, demo_model.VOCABULARY))

    value = measure.perplexity(uniform, windows, batch=3)
    assert value == pytest.approx(demo_model.VOCABULARY, rel=1e-5)


# --- the float64 reference -------------------------------------------------------------------


def test_reference_agrees_with_transformers(trained):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokens = list(TEXT.encode())
    config = json.loads((demo_model.DIRECTORY / "config.json").read_text())
    ours = reference.llama_logits(reference.decoded_weights(trained[0]), config, tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(demo_model.DIRECTORY), dtype=torch.float64
    )
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens])).logits[0].numpy()
    # transformers computes rotary angles in float32: up to T radians, so wrong by up to T * 2^-24,
    # in the queries and the keys of each layer.
    bound = 2 * config["num_hidden_layers"] * len(tokens) * 2.0**-24 * np.abs(theirs).max()
    assert np.abs(ours - theirs).max() <= bound


def test_decoded_weights_are_those_of_the_oracle(judged_fmt):
    with measure.quantized_copy(demo_model.DIRECTORY, judged_fmt) as (model, _, _):
        got = reference.decoded_weights(model)["model.layers.0.mlp.down_proj.weight"]
        layer = model.model.layers[0].mlp.down_proj
        biases = layer.get("biases")
        stored = oracle.Weight(
            oracle.to_numpy(layer.weight),
            oracle.to_numpy(layer.scales),
            None if biases is None else oracle.to_numpy(biases),
        )
    want = oracle.decode(judged_fmt, stored)
    levels = 2**judged_fmt.bits
    scale = 0 if biases is None else np.abs(oracle.f64(stored.scales)).max() * levels
    # product and sum are each rounded to float32; without biases both are exact
    assert np.abs(got - want).max() <= 2 * 2.0**-24 * scale
    assert got.shape == want.shape


def test_accelerated_float32_model_follows_the_reference(judged_fmt):
    tokens = list(TEXT.encode())
    with measure.quantized_copy(demo_model.DIRECTORY, judged_fmt) as (model, _, config):
        want = reference.llama_logits(reference.decoded_weights(model), config, tokens)
        model.apply(lambda value: value.astype(mx.float32) if value.dtype == mx.bfloat16 else value)
        mlx_lowbit.accelerate(model)
        got = oracle.f64(model(mx.array([tokens]))[0])
    # About 1e-6 for each of some twenty products in sequence. Accumulation in bfloat16 or a wrong
    # group shows at 1e-2 and above.
    assert np.linalg.norm(got - want) <= 1e-4 * np.linalg.norm(want)


def test_logit_difference_sees_one_wrong_logit(trained):
    model, tokenizer = trained
    config = json.loads((demo_model.DIRECTORY / "config.json").read_text())
    weights = reference.decoded_weights(model)
    prompt = tokenizer.encode(TEXT)
    run = measure.generate(model, tokenizer, prompt, 3)
    small, largest = measure.logit_difference(weights, config, prompt, run, 3)
    # Each of about ten sums on the residual stream a layer is rounded to 8 bits.
    assert 0 < small < 10 * config["num_hidden_layers"] * 2.0**-9 * largest
    run.logits[2, 65] += 2 * small + 1
    assert measure.logit_difference(weights, config, prompt, run, 3)[0] >= small + 1
    assert measure.logit_difference(weights, config, prompt, run, 2)[0] <= small


# --- the demo --------------------------------------------------------------------------------


def test_generate_keeps_the_logits_of_each_token(trained):
    model, tokenizer = trained
    run = measure.generate(model, tokenizer, tokenizer.encode(TEXT), 4)
    assert run.logits.shape == (4, demo_model.VOCABULARY)
    assert run.tokens == run.logits.argmax(axis=1).tolist()
    assert run.prompt_tps > 0 and run.generation_tps > 0
    with pytest.raises(ValueError, match="count: expected at least 2, got 1"):
        measure.generate(model, tokenizer, [1], 1)


def test_end_token_does_not_stop_a_generation(trained):
    model, tokenizer = trained
    ends = [demo_model.END_OF_FILE] * 4
    run = measure.generate(model, tokenizer, [1], 4, lambda _: mx.array(ends[:1]))
    assert run.tokens == ends
    assert tokenizer.eos_token_ids == set(ends)


def test_quick_run_prints_and_writes_a_row_for_each_format(scratch, monkeypatch, capsys):
    monkeypatch.setattr(demo, "QUICK", TINY)
    target = scratch / "rows.json"
    assert demo.main(["--quick", "--no-models", "--seed", "3", "--json", str(target)]) == 0
    assert [path.name for path in scratch.iterdir()] == ["rows.json"]
    names = [demo.BASELINE, *(fmt.name for fmt in demo.judged_formats())]
    record = json.loads(target.read_text())
    assert [row["format"] for row in record["rows"]] == names
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(names)]] == names
    for row in record["rows"]:
        values = [value for value in row.values() if not isinstance(value, str)]
        assert all(math.isfinite(value) and value > 0 for value in values), row
        assert row["sample"].startswith(demo.PROMPT)


def test_judged_formats_are_one_for_each_mode_and_width():
    chosen = demo.judged_formats()
    widths = [(fmt.mode, fmt.bits) for fmt in chosen]
    assert len(set(widths)) == len(widths)
    assert set(widths) == {(f.mode, f.bits) for f in mlx_lowbit.formats.FORMATS if f.judged}


def test_formats_can_be_chosen_and_keep_their_order(scratch, monkeypatch, capsys):
    monkeypatch.setattr(demo, "QUICK", TINY)
    names = [f.name for f in mlx_lowbit.formats.FORMATS if not f.judged][1::-1]
    assert demo.main(["--quick", "--no-models", "--formats", *names]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == [demo.BASELINE, *names]
    assert lines[5] == ""


def test_quantized_rows_weigh_less(scratch):
    fmt = demo.judged_formats()[0]
    dense, quantized = demo.run([fmt], work=TINY)
    assert dense.bits_per_weight == 16
    assert fmt.bits < quantized.bits_per_weight < fmt.bits + 1.5  # 32/32 of scales, and the norms
    assert quantized.memory_megabytes < dense.memory_megabytes


def test_temporary_directories_go_when_a_run_fails(scratch, monkeypatch):
    def fail(model):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(mlx_lowbit, "accelerate", fail)
    with pytest.raises(RuntimeError, match="no kernel"):
        demo.run(demo.judged_formats()[:1], work=TINY)
    assert not list(scratch.iterdir())


def test_missing_mlx_lm_is_one_line_and_status_1(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    assert demo.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and "pip install mlx-lm" in printed.err


def test_missing_library_sources_are_one_line_and_status_1(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo_model, "library_root", lambda: tmp_path)
    assert demo.main([]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1 and str(tmp_path) in printed.err


@pytest.mark.parametrize("target", ["absent/rows.json", "."])
def test_json_that_cannot_be_written_is_refused_at_once(target, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run", None)
    with pytest.raises(SystemExit) as stop:
        demo.main(["--json", str(tmp_path / target)])
    assert stop.value.code == 2
    assert "--json: expected a file" in capsys.readouterr().err


def test_unknown_format_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit) as stop:
        demo.main(["--formats", "int4"])
    assert stop.value.code == 2
    assert demo.judged_formats()[0].name in capsys.readouterr().err


def test_hidden_size_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="hidden_size: expected a multiple of 256, got 300"):
        measure.random_llama_config(hidden_size=300, intermediate_size=128, layers=1)


def test_sample_text_cannot_control_the_terminal(scratch):
    row = demo.run([], work=TINY)[0]
    row.sample = "a\x1b[2J\u202e\n\tb"
    shown = demo.report([row], TINY)
    assert "a\\x1b[2J\\u202e\n" in shown and "\\tb" in shown


# --- the training script ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def training():
    """The script as a module, where the repository and what it needs are there."""
    for name in ("torch", "transformers"):
        pytest.importorskip(name)
    path = Path(__file__).parents[2] / "benchmarks" / "train_demo_model.py"
    if not path.exists():
        pytest.skip("tests without the repository")
    spec = importlib.util.spec_from_file_location("train_demo_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training_lowers_the_loss_and_writes_a_model_that_loads(
    training, tmp_path, monkeypatch, capsys
):
    source = demo_model.library_root() / "bisect.py"
    monkeypatch.setattr(demo_model, "library_files", lambda *, held_out: [source])
    shape = (
        "--hidden 128 --intermediate 128 --layers 1 --heads 2 --context 32 --tokens-per-step 256"
    )
    training.main(
        ["--out", str(tmp_path), "--steps", "30", "--checkpoint-every", "15", *shape.split()]
    )
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["held_out_perplexity_per_byte"] < demo_model.VOCABULARY / 4
    model, tokenizer = mlx_lm.load(str(tmp_path))
    rows = demo_model.even_windows(demo_model.token_stream([source]), count=10**6, context=32)
    assert measure.perplexity(model, rows) == pytest.approx(
        record["held_out_perplexity_per_byte"], rel=0.05
    )
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_shipped_tokenizer_is_the_one_the_script_writes(training):
    shipped = json.loads((demo_model.DIRECTORY / "tokenizer.json").read_text())
    assert json.loads(training.tokenizer().to_str()) == shipped
