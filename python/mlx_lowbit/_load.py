"""Imports the extension, or says in our own words why it cannot be imported."""

from __future__ import annotations

import importlib.metadata

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
        raise ImportError(
            "mlx_lowbit needs MLX with its library for this machine. Install one of\n"
            '    pip install "mlx-lowbit[cpu]"       Linux without a GPU\n'
            '    pip install "mlx-lowbit[cuda13]"    Linux with an NVIDIA GPU (cuda12 for older drivers)\n'
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
