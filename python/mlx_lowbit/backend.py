"""Which implementation an operation uses: this package's kernels or MLX's own ops."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import mlx.core as mx

from . import _ext, _load
from .formats import Format

__all__ = [
    "Backend",
    "compiled_where_it_runs",
    "get_backend",
    "missing_kernel",
    "on_mlx_where_refused",
    "reason_for_mlx",
    "set_backend",
]

Backend = Literal["auto", "lowbit", "mlx"]

_backend: Backend = "auto"
_noticed: set[str] = set()


def set_backend(backend: Backend) -> None:
    """Chooses the implementation of every operation of this package, in all threads.

    Args:
        backend: ``auto`` uses a kernel of ours where there is one and MLX's op elsewhere, with one
            notice a case; ``lowbit`` refuses instead of falling back; ``mlx`` always uses MLX's op.

    Raises:
        ValueError: any other name.
    """
    global _backend, _settled
    if backend not in ("auto", "lowbit", "mlx"):
        raise ValueError(f"backend must be 'auto', 'lowbit' or 'mlx', got {backend!r}")
    _backend, _settled = backend, None


def get_backend() -> Backend:
    """The name last given to :func:`set_backend`."""
    return _backend


# Device shows its number in its text alone ("Device(gpu, 0)"), which every product would parse.
_index: tuple[mx.Device, int | None] = (mx.Device(mx.cpu), None)


def _gpu_index(stream) -> int | None:
    """The number of the GPU that `stream` is on, or None for the CPU."""
    global _index
    if stream is None:
        stream = mx.default_device()
    device = getattr(stream, "device", stream)  # a stream, a device or a type of device
    if isinstance(device, mx.DeviceType):
        device = mx.Device(device)
    known, index = _index
    if device == known:
        return index
    number = str(device).rpartition(",")[2].strip(" )")
    index = (int(number) if number.isdigit() else 0) if device.type == mx.gpu else None
    _index = (device, index)
    return index


# The default device on which the last product found kernels of ours; None asks again.
_settled: mx.Device | None = None


def settled(stream) -> bool:
    """Whether a product on `stream` runs on kernels of ours, as far as a glance can tell."""
    return stream is None and _settled is not None and mx.default_device() == _settled


def missing_kernel(stream=None, missing_format: str | None = None) -> str | None:
    """Why there is no kernel of ours for a format or a stream, or None; announces nothing."""
    if _load.missing_extension is not None or missing_format is not None:
        return _load.missing_extension or missing_format
    gpu = _gpu_index(stream)
    return None if gpu is None else _load.missing_gpu_kernels(gpu)


def _not_measured(op: str, stream, fmt: Format | None, x, w) -> str | None:
    """Why ``auto`` leaves an operation on Metal to MLX: only measurement speaks for ours there."""
    if _backend != "auto" or fmt is None or _gpu_index(stream) is None:
        return None
    if not mx.metal.is_available():
        return None
    if x is None or w is None:
        return "doctor --tune measures products alone"
    from . import tune

    rows = x.size // max(1, x.shape[-1])
    of_op = {"gather_qmm": "quantized_matmul", "gather_qqmm": "qqmm"}.get(op, op)
    weights = w.size * 32 // fmt.bits
    return tune.read(tune.path(mx.Device(mx.gpu))).slower(of_op, fmt.name, rows, weights)


refusals: dict[str, str] = {}
"""What Metal's compiler said of kernels that it refused, by operation."""


class _Refused(threading.local):
    """Why the operation that a thread repeats must run on MLX's op."""

    reason: str | None = None  # of the class: an attribute that is not there costs a microsecond


_refused = _Refused()

Op = TypeVar("Op", bound=Callable[..., Any])


def on_mlx_where_refused(op: Op) -> Op:
    """Runs `op` on MLX's own op where the device's compiler refuses our kernel.

    With backend ``lowbit`` the refusal is raised.
    """

    @functools.wraps(op)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return op(*arguments, **named)
        except _ext.KernelRefused as error:
            if _backend == "lowbit":
                raise
            refusals[op.__name__] = str(error)
            first = str(error).splitlines()[0]
            _notice(f"[{op.__name__}] uses MLX's own op: Metal's compiler refused {first}")
        _refused.reason = "Metal's compiler refused the kernel"
        try:
            return op(*arguments, **named)
        finally:
            _refused.reason = None

    return call  # type: ignore[return-value]


def compiled_where_it_runs(op: Op) -> Op:
    """For operations of a backend that compiles its kernels at run time, which Metal's does."""
    return on_mlx_where_refused(op) if _ext.has_metal else op


def _notice(text: str) -> None:
    if text not in _noticed:
        _noticed.add(text)
        warnings.warn(text, stacklevel=5)


def reason_for_mlx(
    op: str,
    stream=None,
    missing_format: str | None = None,
    fmt: Format | None = None,
    x: mx.array | None = None,
    w: mx.array | None = None,
) -> str | None:
    """Why `op` must run on MLX's own op, or None when a kernel of ours will run.

    With backend ``auto`` the first fall-back of each kind is announced by a warning. `fmt`, `x`
    and `w` are of a product, whose size decides on Metal (:mod:`mlx_lowbit.tune`).

    Raises:
        RuntimeError: backend ``lowbit``, and no kernel of ours.
    """
    global _settled
    if _backend == "mlx":
        return "set_backend('mlx') asks for it"
    if _refused.reason is not None:
        return _refused.reason
    if missing_format is None and settled(stream):
        return None
    reason = missing_kernel(stream, missing_format)
    reason = reason or _not_measured(op, stream, fmt, x, w)
    if reason is None:
        if stream is None and not mx.metal.is_available():
            _settled = mx.default_device()
        return None
    if _backend == "lowbit":
        raise RuntimeError(f"[{op}] no kernel of mlx_lowbit: {reason}")
    _notice(f"[{op}] uses MLX's own op: {reason}")
    return reason
