"""What doctor --tune keeps, and how it decides: no timing here."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from mlx_lowbit import _ext, backend, doctor, ops, tune
from mlx_lowbit.formats import FORMATS
from mlx_lowbit.tune import Measured, Row


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_LOWBIT_CACHE", str(tmp_path / "cache"))
    tune.read.cache_clear()
    yield tmp_path / "cache"
    tune.read.cache_clear()


def row(M: int, ours: float, mlx: float, op: str = "quantized_matmul", N: int = 4096) -> Row:
    return Row(op, "affine4_g64", M, N, 4096, ours, mlx)


@pytest.mark.parametrize(
    "M, N, ours",
    [(1, 4096, True), (2, 4096, True), (16, 4096, False), (1000, 4096, True), (1, 16384, True)],
)
def test_the_nearest_case_decides(M, N, ours):
    measured = Measured([row(1, 10, 20), row(16, 20, 20), row(1024, 30, 40)])
    reason = measured.slower("quantized_matmul", "affine4_g64", M, N * 4096)
    assert (reason is None) == ours, reason
    assert ours or ("20 us ours, 20 us MLX's" in reason and "M=16" in reason)


@pytest.mark.parametrize(
    "op, name, M, weights",
    [
        ("qqmm", "affine4_g64", 1, 4096**2),
        ("quantized_matmul", "mxfp8", 1, 4096**2),
        ("quantized_matmul", "affine4_g64", 8, 4096**2),
        ("quantized_matmul", "affine4_g64", 1, 64 * 64),
        ("quantized_matmul", "affine4_g64", 0, 4096**2),
    ],
)
def test_what_is_far_from_every_case_is_mlxs(op, name, M, weights):
    assert "doctor --tune" in Measured([row(1, 10, 20)]).slower(op, name, M, weights)


def test_files_are_kept_for_one_device_and_build(cache):
    file = tune.write([row(1, 10, 20)])
    assert file == tune.path() and file.parent == cache
    assert tune.read(file).rows == {("quantized_matmul", "affine4_g64"): [row(1, 10, 20)]}
    assert [p.name for p in cache.iterdir()] == [file.name]
    document = json.loads(file.read_text())
    file.write_text(json.dumps(document | {"build": "another"}))
    tune.read.cache_clear()
    assert tune.read(file).rows == {}


@pytest.mark.parametrize("text", ["", "[]", "{", '{"rows": 3}', '{"build": "%s", "rows": [1]}'])
def test_damaged_files_are_none(cache, text):
    cache.mkdir()
    tune.path().write_text(text.replace("%s", tune.build_name()))
    assert tune.read(tune.path()).rows == {}


def test_on_metal_only_what_was_measured_faster_is_ours(monkeypatch):
    """The device is pretended; MLX's op then runs on the CPU."""
    fmt = next(f for f in FORMATS if f.name == "affine4_g64")
    w, x = mx.zeros((64, 64 * 4 // 32), mx.uint32), mx.zeros((3, 64))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(backend, "_gpu_index", lambda stream: 0)
    monkeypatch.setattr(backend._load, "missing_gpu_kernels", lambda index: None)
    monkeypatch.setattr(backend, "_settled", None)
    monkeypatch.setattr(backend, "_noticed", set())
    monkeypatch.setattr(tune, "device_name", lambda device=None: "Apple M0")
    with pytest.warns(UserWarning, match="doctor --tune has not measured it here"):
        assert backend.reason_for_mlx("quantized_matmul", None, None, fmt, x, w)
    tune.write([Row("quantized_matmul", fmt.name, 4, 64, 64, 10, 20)])
    assert backend.reason_for_mlx("quantized_matmul", None, None, fmt, x, w) is None
    assert backend.reason_for_mlx("gather_qmm", None, None, fmt, x, w) is None
    with pytest.warns(UserWarning, match="products alone"):
        assert backend.reason_for_mlx("dequantize", None, None, fmt)
    tune.write([Row("quantized_matmul", fmt.name, 4, 64, 64, 20, 20)])
    with pytest.warns(UserWarning, match="no slower here"):
        assert backend.reason_for_mlx("quantized_matmul", None, None, fmt, x, w)
    monkeypatch.setattr(backend, "_backend", "lowbit")
    assert backend.reason_for_mlx("quantized_matmul", None, None, fmt, x, w) is None


def test_measured_rows_are_of_both(monkeypatch):
    calls = []
    real = ops.quantized_matmul
    monkeypatch.setattr(
        ops, "quantized_matmul", lambda *a, **k: (calls.append(ops.get_backend()), real(*a, **k))[1]
    )
    monkeypatch.setattr(tune, "TURN_BYTES", 0)
    fmt = next(f for f in FORMATS if f.name == "affine4_g64")
    rows = list(tune.measure((fmt,), ((64, 32),), (2, 1)))
    assert [(r.op, r.format, r.M, r.N, r.K) for r in rows] == [
        ("quantized_matmul", "affine4_g64", M, 32, 64) for M in (1, 2)
    ]
    assert all(r.ours > 0 and r.mlx > 0 for r in rows) and {"lowbit", "mlx"} == set(calls)
    assert backend.get_backend() == "auto"


def test_doctor_names_what_failed(monkeypatch, capsys):
    results = [
        doctor.selftest.Result("qqmm", "nvfp4", "float32", 0.5, 1e-6),
        doctor.selftest.Result("qqmm", "mxfp8", "float32", 1e-7, 1e-6),
        doctor.selftest.Result("quantize", "mxfp8", "float32", float("nan"), 0.1, "no kernel: X"),
    ]
    monkeypatch.setattr(doctor.selftest, "run", lambda: iter(results))
    monkeypatch.setattr(doctor, "devices", lambda: [mx.Device(mx.cpu)])
    assert doctor.main(["--report"]) == 1
    text = capsys.readouterr().out
    assert text.startswith("```\n") and text.endswith("```\n")
    assert "qqmm: 1 of 2 right" in text
    assert "FAILED qqmm nvfp4 float32: beyond its bound" in text
    assert "FAILED quantize mxfp8 float32: no kernel: X" in text
    monkeypatch.setattr(doctor.selftest, "run", lambda: iter(results[1:2]))
    assert doctor.main(["--test"]) == 0
    assert doctor.main([]) == 0 and "self-test" not in capsys.readouterr().out.splitlines()[-1]


def test_doctor_refuses_unknown_formats(capsys):
    with pytest.raises(SystemExit) as stopped:
        doctor.main(["--tune", "--formats", "affine9_g64"])
    assert stopped.value.code == 2 and "affine9_g64" in capsys.readouterr().err


def test_doctor_tunes_and_keeps(monkeypatch, capsys, cache):
    monkeypatch.setattr(tune, "measure", lambda formats: iter([row(1, 10, 20)]))
    assert doctor.main(["--tune", "--formats", "affine4_g64"]) == 0
    assert "2.00x" in capsys.readouterr().out and len(list(cache.iterdir())) == 1


def test_a_refused_or_wrong_kernel_has_no_figure(monkeypatch):
    """One row of x: refused; two: wrong in its last column; three: right."""
    right = ops.quantized_matmul

    def product(x, *weights, **keywords):
        y = right(x, *weights, **keywords)
        if ops.get_backend() == "lowbit" and x.shape[0] == 1:
            raise _ext.KernelRefused("matvec_affine4_g64_bfloat16_1: no such type")
        if ops.get_backend() == "lowbit" and x.shape[0] == 2:
            y = mx.where(mx.arange(y.shape[1]) == 31, 0, y)
        return y

    monkeypatch.setattr(ops, "quantized_matmul", product)
    monkeypatch.setattr(tune, "TURN_BYTES", 0)
    fmt = next(f for f in FORMATS if f.name == "affine4_g64")
    refused, wrong, measured = tune.measure((fmt,), ((64, 32),), (1, 2, 3))
    assert isinstance(refused, tune.Failed) and refused.words.endswith("no such type")
    assert isinstance(wrong, tune.Failed) and wrong.words.startswith("wrong, relative error 0.")
    assert isinstance(measured, tune.Row) and [c.M for c in (refused, wrong, measured)] == [1, 2, 3]
    assert backend.get_backend() == "auto"


def test_right_activations_are_measured(qq_fmt, monkeypatch):
    monkeypatch.setattr(tune, "TURN_BYTES", 0)
    cases = list(tune.measure((qq_fmt,), ((96, 70),), (1, 40)))
    of_one = [("quantized_matmul", 1), ("quantized_matmul", 40), ("qqmm", 1)]
    assert [(c.op, c.M) for c in cases][:3] == of_one  # MLX's CPU has no qqmm of more rows
    assert all(isinstance(c, tune.Row) for c in cases), cases


def test_the_command_for_a_mac(monkeypatch, capsys):
    """All that is asked for, in one block; a kernel that fails is named, and the status is 1."""
    failed = tune.Failed("qqmm", "mxfp8", 16, 4096, 4096, "matmul_mxfp8: no such type")
    cases = [row(1, 10, 20)]
    monkeypatch.setattr(tune, "measure", lambda formats: iter(cases))
    result = doctor.selftest.Result("qqmm", "mxfp8", "float32", 1e-7, 1e-6)
    monkeypatch.setattr(doctor.selftest, "run", lambda: iter([result]))
    monkeypatch.setattr(doctor, "devices", lambda: [mx.default_device()])
    assert doctor.main(["--test", "--tune", "--report"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("```\n") and text.endswith("```\n") and text.count("```") == 2
    assert "qqmm: 1 of 1 right" in text and "2.00x" in text and "1 cases measured" in text
    cases[:] = [failed]
    assert doctor.main(["--test", "--tune", "--report"]) == 1
    text = capsys.readouterr().out
    assert "FAILED qqmm mxfp8 M=16 N=4096 K=4096: matmul_mxfp8: no such type" in text
    assert "not measured" in text, "older figures are gone"
