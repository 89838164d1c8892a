"""Imports the extension and its CUDA part, or says in our own words why that cannot be done."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import sys
import threading
from pathlib import Path

MLX_VERSION = "0.32.4"
NANOBIND_BACKEND_VERSION = "1.0.0"


def _installed(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def check() -> None:
    """Raises ImportError with the command that mends it unless the extension works here."""
    try:
        import mlx.core as mx
    except ImportError as error:
        if "libcuda.so" in str(error):
            raise ImportError(
                "the installed mlx is its CUDA build, and this machine has no NVIDIA driver "
                "(libcuda.so.1). Install the driver, or, to run on the CPU,\n"
                f'    pip uninstall mlx-cuda-13 mlx-cuda-12 && pip install --force-reinstall "mlx[cpu]=={MLX_VERSION}"\n'
                f"(importing mlx.core said: {error})"
            ) from error
        raise ImportError(
            "mlx_lowbit needs MLX with its library for this machine. Install one of\n"
            '    pip install "mlx-lowbit[cpu]"       Linux without a GPU\n'
            '    pip install "mlx-lowbit[cuda13]"    Linux, NVIDIA GPU (cuda12 for older drivers)\n'
            f"(importing mlx.core said: {error})"
        ) from error
    found = _installed("mlx")
    if found != MLX_VERSION:
        raise ImportError(
            f"mlx_lowbit was built against mlx {MLX_VERSION}, whose C++ interface differs from "
            f"that of the installed mlx {found}. Install it, with its library, as one of\n"
            f'    pip install "mlx[cpu]=={MLX_VERSION}"\n'
            f'    pip install "mlx[cuda13]=={MLX_VERSION}"    (cuda12 for older drivers)'
        )
    backend = _installed("nanobind-backend")
    if backend != NANOBIND_BACKEND_VERSION:
        raise ImportError(
            f"mlx_lowbit needs nanobind-backend {NANOBIND_BACKEND_VERSION}, got {backend}. "
            f"Install it with\n    pip install nanobind-backend=={NANOBIND_BACKEND_VERSION}"
        )
    try:
        from . import _ext
    except ImportError as error:
        if sys.platform == "darwin":  # MLX's own kernels are there whatever becomes of ours
            _stand_in(str(error))
            return
        raise ImportError(
            f"mlx_lowbit's extension cannot be loaded beside mlx {found} and nanobind-backend "
            f"{backend}. Reinstall with\n    pip install --force-reinstall mlx-lowbit\n"
            f"(the loader said: {error})"
        ) from error
    try:
        _ext.same_array(mx.array(0))
    except TypeError as error:
        raise ImportError(
            "mlx_lowbit and mlx.core do not share their array type: they were built with "
            f"different nanobind versions (nanobind-backend {backend} is installed, "
            f"{NANOBIND_BACKEND_VERSION} is expected). Install it with\n"
            f"    pip install nanobind-backend=={NANOBIND_BACKEND_VERSION} mlx=={MLX_VERSION}"
        ) from error


missing_extension: str | None = None
"""Why a stand-in has the extension's place, or None."""


def _stand_in(reason: str) -> None:
    global missing_extension
    name = f"{__package__}._ext"
    sys.modules[name] = module = importlib.import_module(f"{__package__}._no_extension")
    sys.modules[__package__]._ext = module
    missing_extension = (
        f"the extension of this installation is missing or cannot be loaded: {reason}"
    )


CUDA_OBJECT = Path(__file__).with_name("_cuda.so")
_cuda_lock = threading.Lock()


@functools.cache
def _load_cuda(path: Path) -> str | None:
    """Loads the CUDA kernels once; why they cannot be loaded, or None."""
    from . import _ext

    if not path.exists():
        built = f": {_ext.cuda_build}" if _ext.cuda_build else ""
        return f"this installation has no CUDA kernels{built}"
    try:
        _ext.load_cuda(str(path))
    except RuntimeError as error:
        return f"the CUDA kernels of this installation cannot be loaded; reinstall mlx-lowbit ({error})"
    return None


@functools.cache
def _refusal(device: int) -> str | None:
    from . import _ext

    reason = _ext.cuda_refusal(device)
    return f"no CUDA kernels for device {device}: {reason}" if reason else None


def missing_gpu_kernels(device: int = 0) -> str | None:
    """Why GPU `device` of this process cannot run our kernels, or None; loads them if it can.

    The kernels are a shared object of their own, looked for when a GPU is first asked about.
    """
    import mlx.core as mx

    from . import _ext

    if missing_extension is not None:
        return missing_extension
    if mx.metal.is_available():
        return None if _ext.has_metal else "this installation has no kernels for Metal"
    if not mx.cuda.is_available():
        return "MLX has no CUDA device here (mlx_lowbit.doctor says more)"
    with _cuda_lock:
        reason = _load_cuda(CUDA_OBJECT)
    return reason or _refusal(device)
