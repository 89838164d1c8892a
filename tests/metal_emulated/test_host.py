"""The host code of kernels/metal on a mock of MLX's device: buffers, constants, grids, fallbacks."""

from __future__ import annotations

import host
import mlx.core as mx
import numpy as np
import oracle
import pytest
import strategies
from mlx_lowbit import formats

import kernels
from kernels import KERNELS

FORMATS = [
    formats.get(bits=3, group_size=128),
    formats.get(bits=4, group_size=64),
    formats.get(mode="mxfp8"),
    formats.get(mode="nvfp4"),
]


@pytest.fixture(scope="module")
def device():
    try:
        host.wheel()
    except host.Unavailable as error:
        pytest.skip(str(error))
    return host.Host(host.build())


@pytest.fixture(params=FORMATS, ids=lambda f: f.name)
def some_fmt(request):
    return request.param


def entries(device):
    return [entry.split("_")[0] for entry, *_ in device.launches]


def operands(rng, fmt, dtype, shape, K, N, experts=()):
    x = strategies.activations(rng, (*shape, K), dtype)
    return x, strategies.random_weight(rng, fmt, N, K, dtype, experts)


@pytest.mark.parametrize(
    "M, kernel", [(1, "matvec"), (3, "matvec"), (11, "matmul"), (40, "matmul")]
)
def test_products(device, some_fmt, M, kernel, rng):
    fmt = some_fmt
    x, w = operands(rng, fmt, mx.bfloat16, (M,), 3 * fmt.group_size, 77)
    bias = strategies.activations(rng, (77,), mx.float32 if M % 2 else mx.bfloat16)
    scale = {"global_scale": 900.0} if fmt.mode == "nvfp4" else {}
    y = device.product(fmt, x, w, bias=bias, **scale)
    want = oracle.quantized_matmul(fmt, x, w, bias=bias, **scale)
    oracle.assert_close(oracle.to_mlx(y), want, x.shape[1])
    assert entries(device) == [kernel]


def test_scales_of_their_own_dtype(device, dtype, rng):
    """Scales in float16 whatever x is: a constant of the kernel."""
    fmt = FORMATS[1]
    _, w = operands(rng, fmt, mx.float16, (1,), 128, 40)
    x = strategies.activations(rng, (2, 128), dtype)
    oracle.assert_close(
        oracle.to_mlx(device.product(fmt, x, w)), oracle.quantized_matmul(fmt, x, w), 128
    )


@pytest.mark.parametrize("some_fmt", FORMATS[2:], indirect=True, ids=lambda f: f.name)
@pytest.mark.parametrize("M", [2, 9])
def test_quantized_activations(device, some_fmt, M, dtype, rng, monkeypatch):
    fmt = some_fmt
    monkeypatch.setattr(oracle, "on_gpu", lambda: True)
    x, w = operands(rng, fmt, dtype, (M,), 4 * fmt.group_size, 45)
    scales = {}
    if fmt.mode == "nvfp4":
        most = float(np.abs(x.astype(np.float32)).max())
        scales = {"global_scale_x": most, "global_scale": 1000.0}
    y = device.product(fmt, x, w, quantize_x=True, **scales)
    named = {("global_scale_w" if k == "global_scale" else k): v for k, v in scales.items()}
    want = oracle.qqmm(fmt, x, w, **named)
    oracle.assert_close(oracle.to_mlx(y), want, x.shape[1])
    assert entries(device)[0] == "round"


def pairs_of(rng, fmt, count, M, matrices, N, dtype=mx.float16):
    x, w = operands(rng, fmt, dtype, (3, M), 2 * fmt.group_size, N, (matrices,))
    rhs, lhs = rng.integers(0, matrices, count), rng.integers(0, 3, count)
    rhs[-1] = -1
    bias = strategies.activations(rng, (matrices, N), dtype)
    return x, w, lhs.astype(np.int64), rhs.astype(np.int64), bias


def assert_pairs(y, fmt, x, w, lhs, rhs, bias=None, quantize_x=False, **options):
    """y[i] is x[lhs[i]] times w[rhs[i]], and NaN where there is no such w."""
    named = {("global_scale_w" if k == "global_scale" else k): v for k, v in options.items()}
    for i, (a, b) in enumerate(zip(lhs, rhs, strict=True)):
        if b < 0:
            assert np.isnan(y[i].astype(np.float32)).all()
            continue
        one = oracle.Weight(*(None if p is None else p[b] for p in w))
        of_one = None if bias is None else bias[b]
        if quantize_x:
            want = oracle.qqmm(fmt, x[a], one, bias=of_one, **named)
        else:
            want = oracle.quantized_matmul(fmt, x[a], one, bias=of_one, **options)
        oracle.assert_close(oracle.to_mlx(y[i]), want, x.shape[-1])


@pytest.mark.parametrize(
    "count, M, ran", [(5, 1, ["matvec"]), (24, 2, ["group", "matmul"]), (3, 9, ["matvec"])]
)
def test_pairs(device, some_fmt, count, M, ran, rng):
    fmt = some_fmt
    x, w, lhs, rhs, bias = pairs_of(rng, fmt, count, M, 4 if count > 5 else 40, 41)
    y = device.product(fmt, x, w, lhs=lhs, rhs=rhs, bias=bias)
    assert entries(device) == ran
    assert_pairs(y, fmt, x, w, lhs, rhs, bias)


@pytest.mark.parametrize("some_fmt", FORMATS[2:], indirect=True, ids=lambda f: f.name)
@pytest.mark.parametrize("count, ran", [(5, "matvec"), (24, "matmul")])
def test_pairs_of_quantized_activations(device, some_fmt, count, ran, dtype, rng, monkeypatch):
    """Experts whose activations are quantized; those of nvfp4 have global scales of their own."""
    fmt = some_fmt
    monkeypatch.setattr(oracle, "on_gpu", lambda: True)
    x, w, lhs, rhs, _ = pairs_of(rng, fmt, count, 2, 4 if count > 5 else 40, 41, dtype)
    scales = {}
    if fmt.mode == "nvfp4":
        most = float(np.abs(x.astype(np.float32)).max())
        scales = {"global_scale_x": most, "global_scale": 1000.0}
    y = device.product(fmt, x, w, quantize_x=True, lhs=lhs, rhs=rhs, **scales)
    assert [entry for entry in entries(device) if entry != "group"] == ["round", ran]
    assert_pairs(y, fmt, x, w, lhs, rhs, quantize_x=True, **scales)


def test_pairs_of_columns(device, some_fmt, rng):
    """What the gradient of pairs multiplies: w as [K, N]."""
    fmt = some_fmt
    N = 2 * fmt.group_size
    x = strategies.activations(rng, (3, 2, 50), mx.float16)
    w = strategies.random_weight(rng, fmt, 50, N, mx.float16, (4,))
    lhs, rhs = np.array([0, 2, 1]), np.array([3, 3, 0])
    y = device.product(fmt, x, w, transpose=False, lhs=lhs, rhs=rhs)
    assert_pairs(y, fmt, x, w, lhs, rhs, transpose=False)
    assert entries(device) == ["vecmat"]


def test_quantize_and_dequantize(device, some_fmt, dtype, rng, monkeypatch):
    fmt = some_fmt
    monkeypatch.setattr(oracle, "on_gpu", lambda: True)
    w = strategies.activations(rng, (5, 3 * fmt.group_size), dtype)
    scale = float(np.abs(w.astype(np.float32)).max()) if fmt.mode == "nvfp4" else None
    got, want = device.quantize(fmt, w, scale), oracle.encode(fmt, w, scale)
    np.testing.assert_array_equal(got.words, want.words)
    values = device.dequantize(fmt, got, oracle.NUMPY_DTYPE[dtype], scale)
    exact = oracle.decode(fmt, got, scale)
    eps = {"float32": 2.0**-22, "float16": 2.0**-10, "bfloat16": 2.0**-7}[values.dtype.name]
    np.testing.assert_allclose(values.astype(np.float64), exact, rtol=eps, atol=1e-7)


def test_pipelines_with_fewer_threads(device, rng):
    """Registers may leave a kernel less than the plan asks for: the grid follows."""
    fmt = FORMATS[1]
    x, w = operands(rng, fmt, mx.float16, (9,), 128, 600)
    results = []
    for device.most_threads in (1024, 160, 32):
        results.append(device.product(fmt, x, w))
        _, grid, threads, _ = device.launches[0]
        assert threads[0] <= device.most_threads and grid[0] == -(-600 // threads[0])
    device.most_threads = 1024
    for y in results[1:]:
        np.testing.assert_array_equal(y, results[0])


def test_what_the_compiler_refuses(rng):
    """The name of the kernel and the compiler's words; other kernels run, and nothing is retried."""
    try:
        # An object of its own: the loader would hand out the one that has compiled them all.
        path = host.build(lambda text: text + "// another\n")
    except host.Unavailable as error:
        pytest.skip(str(error))
    device = host.Host(path, kind="run", refuse=("mxfp8_bfloat16",))
    fmt = FORMATS[2]
    x, w = operands(rng, fmt, mx.bfloat16, (1,), 64, 8)
    for _ in range(2):
        with pytest.raises(host.Refused, match=r"matvec_mxfp8_bfloat16_1: .*\n.*as the test wants"):
            device.product(fmt, x, w)
        device.refuse = ()
    x16 = x.astype(np.float16)
    y = device.product(fmt, x16, w)
    oracle.assert_close(oracle.to_mlx(y), oracle.quantized_matmul(fmt, x16, w), 64)


def test_explain(device):
    assert "metal matmul" in device.explain(FORMATS[1], 16, 4096, 4096)


# What may be wrong in launch.cpp, and whom it concerns: each has to be noticed.
WRONG = {
    "scales at the buffer of biases": (".weight(in.scales, kScales)", ".weight(in.scales, kBiases)"),
    "w and x exchanged": ("in(x, kX).weight(in.w, kW)", "in(x, kW).weight(in.w, kX)"),
    "y at the buffer of groups": (".out(out, kY)", ".out(out, kGroups)"),
    "M and N exchanged": (
        "ProductArgs{int(s.M), int(s.N)", "ProductArgs{int(s.N), int(s.M)",
    ),
    "a grid of one tile of w less": ("const int64_t w_tiles = ", "const int64_t w_tiles = -1 + "),
    "no tile of tokens but the first": ("ceil_div(s.M, plan.tokens), s.pairs", "1, s.pairs"),
    "y of another dtype": (".y_type = int(p.dtype)", ".y_type = 1"),
    "scales of another dtype": (
        ".scale_type = scale_number(p.format, *in.scales)", ".scale_type = 1",
    ),
    "no bias": (".bias_type = in.bias ? int(dtype_of(in.bias->dtype())) : -1", ".bias_type = -1"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_wrong_host_code_is_noticed(device, what, rng):
    before, after = WRONG[what]
    wrong = host.Host(host.build(lambda text: text.replace(before, after)))
    wrong._libraries.update(device._libraries)
    fmt = FORMATS[1]
    x, w = operands(rng, fmt, mx.bfloat16, (140,), 128, 700)
    bias = strategies.activations(rng, (700,), mx.bfloat16)
    with pytest.raises(AssertionError):
        y = wrong.product(fmt, x, w, bias=bias)
        oracle.assert_close(oracle.to_mlx(y), oracle.quantized_matmul(fmt, x, w, bias=bias), 128)


def all_of_nvfp4(device, rng):
    """Pairs one by one and sorted, quantized activations, a global scale of w alone, quantize."""
    fmt = FORMATS[3]
    for count, matrices, quantize_x in ((5, 40, False), (24, 7, False), (24, 7, True)):
        x, w, lhs, rhs, bias = pairs_of(rng, fmt, count, 1 + count % 2, matrices, 41)
        scales = {"global_scale": 900.0}
        if quantize_x:
            scales["global_scale_x"] = float(np.abs(x.astype(np.float32)).max())
        y = device.product(fmt, x, w, quantize_x=quantize_x, lhs=lhs, rhs=rhs, bias=bias, **scales)
        assert_pairs(y, fmt, x, w, lhs, rhs, bias, quantize_x, **scales)
    values = strategies.activations(rng, (40, 96), mx.float16)
    got, want = device.quantize(fmt, values, 9.0), oracle.encode(fmt, values, 9.0)
    np.testing.assert_array_equal(got.words, want.words)
    back = device.dequantize(fmt, got, np.dtype(np.float16), 9.0)
    np.testing.assert_allclose(back, oracle.decode(fmt, got, 9.0), rtol=2.0**-10, atol=1e-7)


# Pairs, global scales and what goes over elements.
WRONG_ELSEWHERE = {
    "lhs and rhs exchanged": ("in(in.lhs, kLhs).in(in.rhs, kRhs)", "in(in.lhs, kRhs).in(in.rhs, kLhs)"),
    "no pairs": (".gather = kind.gather", ".gather = false"),
    "one pair": ("plan.tokens), s.pairs, simdgroups", "plan.tokens), 1, simdgroups"),
    "pairs that are not sorted": (".grouped = plan.grouped", ".grouped = false"),
    "too few sorted tiles": ("s.pairs * s.M / plan.tokens + matrices", "s.pairs * s.M / plan.tokens"),
    "sorted by other matrices": ("GroupArgs{M, pairs, matrices}", "GroupArgs{M, pairs, matrices - 1}"),
    "w's global scale as that of x": ("in(in.global_w, kGlobalW)", "in(in.global_w, kGlobalX)"),
    "w's global scale left out": (".has_global_w = in.global_w.has_value()", ".has_global_w = false"),
    "x rounded to another scale": ("launch.in(global, kQGlobal);\n  run_elements(launch, x.size())",
                                   "run_elements(launch, x.size())"),
    "x that is not rounded": ("kind.quantize_x ? round_trip(kind.format, in.x, in.global_x, stream) : in.x", "in.x"),
    "codes and scales exchanged": ("kQCodes + int(i)", "kQCodes + (int(i) ^ 1)"),
    "half of the elements": ("return {int64_t(elements) /", "return {int64_t(elements) / 2 /"),
    "a grid of half of the elements": ("int64_t(elements), 32 * 32", "int64_t(elements) / 2, 32 * 32"),
}  # fmt: skip


@pytest.mark.parametrize("what", [None, *WRONG_ELSEWHERE])
def test_wrong_host_code_of_pairs_and_elements_is_noticed(device, what, rng, monkeypatch):
    monkeypatch.setattr(oracle, "on_gpu", lambda: True)
    if what is None:
        all_of_nvfp4(device, rng)
        assert not kernels.fails(lambda: all_of_nvfp4(device, rng))
        return
    before, after = WRONG_ELSEWHERE[what]
    wrong = host.Host(host.build(lambda text: text.replace(before, after)))
    assert kernels.fails(lambda: all_of_nvfp4(wrong, rng))


def test_the_names_of_kernels_are_the_plan_s():
    from mlx_lowbit import _ext

    for number, name in enumerate(KERNELS):
        fmt = 0 if name != "round_trip" else formats.get(mode="nvfp4").id
        _, names = _ext.metal_source([number], fmt)
        assert names and all(entry.startswith(name) for entry, *_ in names)
