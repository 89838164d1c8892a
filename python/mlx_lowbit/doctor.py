"""``mlx_lowbit.doctor``: what this installation has, what it runs on, and why not on the rest."""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
from collections.abc import Sequence

import mlx.core as mx

from . import _ext, _load

PACKAGES = ("mlx-lowbit", "mlx", "mlx-cuda-13", "mlx-cuda-12", "nanobind-backend", "mlx-lm")


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


def _metal() -> str:
    here = "" if mx.metal.is_available() else "no device; "
    return f"{here}no kernels in this version, which has never run on Apple hardware: MLX's run"


def facts() -> list[tuple[str, str]]:
    """(subject, what is so) in the order of the report; a subject may have several lines."""
    rows = [(name, found) for name in PACKAGES if (found := _version(name)) is not None]
    rows.append(("python", f"{platform.python_version()} on {platform.system()}"))
    rows.append(("default device", str(mx.default_device())))
    others = ", ".join(name for name in _ext.targets() if name != _ext.target())
    rows.append(("cpu", f"{_ext.target()}, {_ext.threads()} threads (also built: {others})"))
    rows += [("cuda", line) for line in _cuda()]
    rows.append(("metal", _metal()))
    return rows


def report() -> str:
    """The facts, one a line."""
    rows = facts()
    width = max(len(subject) for subject, _ in rows)
    return "\n".join(f"{subject:<{width}}  {text}" for subject, text in rows)


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line: no options yet."""
    return argparse.ArgumentParser(
        prog="mlx_lowbit.doctor",
        description="Prints versions and devices, and why kernels are not used where they are not.",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the report; returns the exit status."""
    setup_arg_parser().parse_args(argv)
    print(report())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
