"""Options, hypothesis profiles, and the parameters every test takes from the format registry.

    pytest tests --profile ci|dev|nightly   how many examples (or MLX_LOWBIT_TEST_PROFILE)
    pytest tests --seed N                   repeats a run; the seed is printed in the header
    pytest tests --target NAME              forces one instruction set (or MLX_LOWBIT_TARGET)
    pytest tests --backend cuda             the same tests on the GPU; default: cpu

A test that names `fmt` runs once for every format; `affine_fmt`, `scaled_fmt` (a scale byte a
group), `fp4_fmt`, `mx_fmt`, `nv_fmt`, `qq_fmt` (quantized activations) and `judged_fmt` are parts
of them, and `dtype` is every dtype. Outputs are filled with NaN before a kernel runs
(MLX_LOWBIT_POISON), so that what a kernel forgets to write is seen.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import hypothesis
import pytest

# The oracle's products are small: threads of numpy's BLAS would only contend with the kernels.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))  # oracle, strategies, harness

# What --backend cuda leaves out: the CPU's plans, its instruction sets, and what only holds for x
# in fixed point or codes in float32 (on CUDA codes meet x as 128 + code, in bfloat16).
CPU_ONLY = ("plan/test_explain.py", "parity/test_targets.py", "ops/test_fixed_point.py")

for name, examples in (("ci", 6), ("dev", 25), ("nightly", 200)):
    hypothesis.settings.register_profile(
        name,
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.function_scoped_fixture,
            hypothesis.HealthCheck.differing_executors,
        ],
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mlx-lowbit")
    group.addoption(
        "--profile",
        choices=["ci", "dev", "nightly"],
        default=os.environ.get("MLX_LOWBIT_TEST_PROFILE", "ci"),
    )
    group.addoption("--seed", type=int, default=None, help="seed of hypothesis and of `rng`")
    group.addoption(
        "--target",
        default=os.environ.get("MLX_LOWBIT_TARGET"),
        help="instruction set to force, one of mlx_lowbit._ext.targets()",
    )
    group.addoption("--backend", choices=["cpu", "cuda"], default="cpu", help="kernels to judge")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # The extension and MLX read these when they are imported, which happens after this.
    os.environ["MLX_LOWBIT_POISON"] = "1"
    # MLX's own float32 products on a GPU are held to the same tolerances as everything else.
    os.environ["MLX_ENABLE_TF32"] = "0"
    if target := config.getoption("--target"):
        os.environ["MLX_LOWBIT_TARGET"] = target
    hypothesis.settings.load_profile(config.getoption("--profile"))
    # The processes of pytest-xdist take the seed of the one that starts them.
    seed = config.getoption("--seed")
    if seed is None:
        seed = int(os.environ.get("MLX_LOWBIT_TEST_SEED") or random.SystemRandom().randrange(2**32))
    os.environ["MLX_LOWBIT_TEST_SEED"] = str(seed)
    config.stash[SEED] = seed
    if config.getoption("--hypothesis-seed", default=None) is None:
        hypothesis.core.global_force_seed = config.stash[SEED]


SEED = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--backend") == "cpu":
        return
    left = [
        item
        for item in items
        if item.get_closest_marker("cpu") or item.path.as_posix().endswith(CPU_ONLY)
    ]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_report_header(config: pytest.Config) -> str:
    from mlx_lowbit import _ext, backend

    asked = config.getoption("--target")
    if asked and _ext.target() != asked:
        raise pytest.UsageError(f"--target {asked}: not one of {', '.join(_ext.targets())}")
    if config.getoption("--backend") == "cuda":
        import mlx.core as mx

        if reason := backend.missing_kernel(mx.gpu):
            raise pytest.UsageError(f"--backend cuda: {reason}")
    return (
        f"mlx-lowbit: backend {config.getoption('--backend')}, profile {config.getoption('--profile')}, --seed {config.stash[SEED]}, "
        f"target {_ext.target()} of {', '.join(_ext.targets())}"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    import mlx.core as mx
    from mlx_lowbit.formats import FORMATS
    from strategies import QQ_MODES

    choices = {
        "fmt": FORMATS,
        "affine_fmt": [f for f in FORMATS if f.has_biases],
        "scaled_fmt": [f for f in FORMATS if not f.has_biases],
        "fp4_fmt": [f for f in FORMATS if not f.has_biases and f.bits == 4],
        "mx_fmt": [f for f in FORMATS if f.mode in ("mxfp4", "mxfp8")],
        "nv_fmt": [f for f in FORMATS if f.mode == "nvfp4"],
        "qq_fmt": [f for f in FORMATS if f.mode in QQ_MODES],
        "judged_fmt": [f for f in FORMATS if f.judged],
    }
    for argument, formats in choices.items():
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, formats, ids=[f.name for f in formats])
    if "dtype" in metafunc.fixturenames:
        dtypes = [mx.float32, mx.float16, mx.bfloat16]
        metafunc.parametrize("dtype", dtypes, ids=["float32", "float16", "bfloat16"])


@pytest.fixture(scope="session", autouse=True)
def _device(request: pytest.FixtureRequest) -> None:
    """The kernels that --backend names are judged, whatever other device MLX prefers."""
    import mlx.core as mx

    mx.set_default_device(mx.cpu if request.config.getoption("--backend") == "cpu" else mx.gpu)


@pytest.fixture
def rng(request: pytest.FixtureRequest):
    """numpy generator of the run's seed, different for every test."""
    import numpy as np

    return np.random.default_rng([request.config.stash[SEED], *request.node.nodeid.encode()])


@pytest.fixture(params=["auto", "lowbit"])
def backend(request: pytest.FixtureRequest):
    """Both ways to reach our kernels; what was chosen before is restored."""
    import mlx_lowbit

    before = mlx_lowbit.get_backend()
    mlx_lowbit.set_backend(request.param)
    yield request.param
    mlx_lowbit.set_backend(before)
