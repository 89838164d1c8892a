"""MLX's figures of memory, with what it does not count: small results of CUDA kernels.

Results of less than 2 MiB and scratch come from a pool of this package
(``kernels/cuda/launch_memory.h``), which ``mx.get_active_memory`` and ``mx.get_peak_memory`` do not
see. On a CPU and on Metal the functions here return what MLX's of the same name do.
"""

from __future__ import annotations

import mlx.core as mx

from . import _ext, _load

__all__ = ["get_active_memory", "get_cache_memory", "get_peak_memory", "reset_peak_memory"]


def _pool() -> tuple[int, int, int]:
    """(active, peak together with MLX's, cached) of the first GPU, in bytes."""
    return _ext.cuda_memory() if _counted() else (0, 0, 0)


def _counted() -> bool:
    return mx.cuda.is_available() and _load.missing_gpu_kernels() is None


def get_active_memory() -> int:
    """Bytes that arrays take now."""
    return mx.get_active_memory() + _pool()[0]


def get_peak_memory() -> int:
    """The most bytes that arrays took since the start or the last :func:`reset_peak_memory`.

    With CUDA kernels, the most that MLX's arrays took, or that these and the pool took together at
    a time when the pool gave some out: less than the truth by what the pool held at most.
    """
    return max(mx.get_peak_memory(), _pool()[1])


def get_cache_memory() -> int:
    """Bytes that are free to be used again, and not given back to the device."""
    return mx.get_cache_memory() + _pool()[2]


def reset_peak_memory() -> None:
    """Forget the peak, MLX's too."""
    mx.reset_peak_memory()
    if _counted():
        _ext.reset_cuda_peak()
