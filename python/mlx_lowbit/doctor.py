"""``mlx_lowbit.doctor``: what this installation has, what it runs on, and why not on the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence

import mlx.core as mx
from tqdm import tqdm

from . import _ext, _load, backend, selftest, tune
from .formats import FORMATS

PACKAGES = (
    "mlx-lowbit",
    "mlx",
    "mlx-metal",
    "mlx-cuda-13",
    "mlx-cuda-12",
    "nanobind-backend",
    "mlx-lm",
)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cuda() -> list[str]:
    """The devices that MLX sees, and whether the kernels run on them."""
    if not mx.cuda.is_available():
        if _version("mlx-cuda-13") or _version("mlx-cuda-12"):
            why = "MLX's CUDA build finds no NVIDIA driver or no GPU"
        else:
            why = "the installed MLX has no CUDA; pip install 'mlx-lowbit[cuda13]' brings it"
        return [f"no device: {why}", _cuda_kernels()]
    lines = []
    for index in range(mx.device_count(mx.gpu)):
        info = mx.device_info(mx.Device(mx.gpu, index))
        lines.append(
            f"device {index}: {info['device_name']}, compute capability "
            f"{info['compute_capability_major']}.{info['compute_capability_minor']}, "
            f"{info['total_memory'] / 1e9:.1f} GB ({info['free_memory'] / 1e9:.1f} GB free)"
        )
        lines.append(_load.missing_gpu_kernels(index) or f"kernels: loaded ({_ext.build})")
    return lines


def _cuda_kernels() -> str:
    """Whether this installation has the kernels, where there is no device to ask."""
    if _load.CUDA_OBJECT.exists():
        return f"kernels: installed ({_ext.build})"
    return f"kernels: not in this installation ({_ext.cuda_build or 'the file is missing'})"


NEVER_RUN = (
    "type-checked and emulated on Linux; not compiled by Apple's compiler and not run on an Apple "
    "GPU yet: mlx_lowbit.doctor --test --tune --report changes that"
)


def _metal() -> list[str]:
    """Whether there are kernels for an Apple GPU, and what its compiler said of them."""
    there = mx.metal.is_available()
    device = [f"device: {tune.device_name(mx.Device(mx.gpu))}" if there else "no device"]
    reason = _load.missing_extension
    if reason is None and not _ext.has_metal:
        reason = "this installation has no kernels for Metal, which is built on macOS alone"
    if reason is not None:
        return [*device, f"no kernels: {reason}"]
    refused = [f"refused, MLX's runs: {words}" for words in backend.refusals.values()]
    return [*device, f"kernels: compiled in ({_ext.build}), {NEVER_RUN}", *refused]


def facts() -> list[tuple[str, str]]:
    """(subject, what is so) in the order of the report; a subject may have several lines."""
    rows = [(name, found) for name in PACKAGES if (found := _version(name)) is not None]
    system = f"macOS {mac}" if (mac := platform.mac_ver()[0]) else platform.system()
    rows.append(("python", f"{platform.python_version()} on {system}"))
    rows.append(("default device", str(mx.default_device())))
    others = ", ".join(name for name in _ext.targets() if name != _ext.target())
    rows.append(("cpu", f"{_ext.target()}, {_ext.threads()} threads (also built: {others})"))
    if platform.system() != "Darwin":
        rows += [("cuda", line) for line in _cuda()]
    rows += [("metal", line) for line in _metal()]
    return rows


def report() -> str:
    """The facts, one a line."""
    return lines_of(facts())


def lines_of(rows: Sequence[tuple[str, str]]) -> str:
    """Subjects and texts in two columns."""
    width = max(len(subject) for subject, _ in rows)
    return "\n".join(f"{subject:<{width}}  {text}" for subject, text in rows)


def devices() -> list[mx.Device]:
    """The CPU, and the GPU that MLX has here."""
    gpu = mx.metal.is_available() or mx.cuda.is_available()
    return [mx.Device(mx.cpu)] + ([mx.Device(mx.gpu)] if gpu else [])


def self_test(device: mx.Device) -> tuple[bool, list[str]]:
    """Whether every op that has a kernel of ours on `device` is right, and what to say of it.

    Runs :mod:`mlx_lowbit.selftest`; one line for each op, and one for each kind of failure.
    """
    reason = backend.missing_kernel(device)
    if reason is not None:
        return True, [f"not run: {reason}"]
    with mx.stream(device):
        results = list(tqdm(selftest.run(), desc=f"self-test {device}", leave=False, disable=None))
    lines = []
    for op in dict.fromkeys(result.op for result in results):
        of_op = [result for result in results if result.op == op]
        right = sum(result.ok for result in of_op)
        shares = [result.error / result.bound for result in of_op if not result.reason]
        worst = f", worst {max(shares):.2f} of its bound" if shares else ""
        lines.append(f"{op}: {right} of {len(of_op)} right{worst}")
    failed = [result for result in results if not result.ok]
    for why in dict.fromkeys(r.reason or "beyond its bound" for r in failed):
        cases = [r for r in failed if (r.reason or "beyond its bound") == why]
        where = ", ".join(f"{r.op} {r.format} {r.dtype}" for r in cases[:4])
        more = f" and {len(cases) - 4} more" if len(cases) > 4 else ""
        lines.append(f"FAILED {where}{more}: {why}")
    return not failed, lines


def tuned(device: mx.Device) -> str:
    """What is measured of `device`."""
    file = tune.path(device)
    count = sum(len(rows) for rows in tune.read(file).rows.values())
    return f"{count} cases measured ({file})" if count else "not measured: --tune does"


def examination() -> tuple[bool, list[tuple[str, str]]]:
    """Whether all self-tests passed, and the facts with their outcome."""
    outcome, good = [], True
    for device in devices():
        right, lines = self_test(device)
        good &= right
        outcome += [(f"self-test {device.type.name}", line) for line in lines]
        outcome.append((f"measured {device.type.name}", tuned(device)))
    # After the tests, which find out what a device's compiler refuses.
    return good, facts() + outcome


def tune_device(device: mx.Device, formats: Sequence[str]) -> tuple[bool, str]:
    """Whether every kernel ran and was right, and the times of ours and MLX's in columns.

    Keeps the figures. Below them is what kept a case from having one.
    """
    chosen = [f for f in FORMATS if f.name in formats] if formats else None
    measured: list[tune.Row] = []
    failed: list[tune.Failed] = []
    with mx.stream(device):
        for case in tqdm(tune.measure(chosen), desc="tune", unit=" cases", disable=None):
            (measured if isinstance(case, tune.Row) else failed).append(case)
    if not measured and not failed:
        return True, f"nothing to measure on {device}: {backend.missing_kernel(device)}"
    lines = [tune.table(measured), str(tune.write(measured, device))]
    lines += [f"FAILED {c.op} {c.format} M={c.M} N={c.N} K={c.K}: {c.words}" for c in failed]
    return not failed, "\n".join(lines)


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="mlx_lowbit.doctor",
        description="Prints versions and devices, and why kernels are not used where they are not.",
    )
    parser.add_argument("--test", action="store_true", help="run every op against float64 as well")
    parser.add_argument(
        "--report", action="store_true", help="all of it as a block to paste into an issue"
    )
    parser.add_argument(
        "--tune",
        action="store_true",
        help="time ours and MLX's on the default device and keep the figures, which decide on Metal",
    )
    parser.add_argument("--formats", nargs="+", default=[], help="of --tune; default: all judged")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; the exit status is 1 where a kernel failed."""
    parser = setup_arg_parser()
    options = parser.parse_args(argv)
    names = [f.name for f in FORMATS]
    for name in options.formats:
        if name not in names:
            parser.error(f"--formats: expected some of {', '.join(names)}, got {name}")
    good, parts = True, []
    if options.tune:  # first: the report says what is measured
        good, figures = tune_device(mx.default_device(), options.formats)
        parts = [figures]
    if options.test or options.report:
        right, rows = examination()
        good &= right
        parts.insert(0, lines_of(rows))
    text = "\n".join(parts) or report()
    print(f"```\n{text}\n```" if options.report else text)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
