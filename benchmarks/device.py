"""What the machine is, for the header and the file name."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import mlx.core as mx
from mlx_lowbit import _ext


def device_name() -> str:
    """The accelerator's name if MLX runs on one, otherwise the processor's."""
    if mx.default_device() != mx.Device(mx.cpu):
        return str(mx.device_info()["device_name"])
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in text.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def target_name() -> str:
    """The instruction set that our kernels run with."""
    return str(_ext.target())


def thread_count() -> int:
    """The threads that our kernels use; every other library is set to as many."""
    return int(_ext.threads())


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core reports, 32 MiB if it reports none."""
    units = {"K": 2**10, "M": 2**20}
    texts = (
        path.read_text().strip()
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    )
    sizes = [int(text[:-1]) * units[text[-1]] for text in texts if text[-1:] in units]
    return max(sizes, default=32 * 2**20)


def busy_seconds() -> float | None:
    """Seconds that all cores together were busy since boot; None without /proc/stat.

    Busy is user, nice, system, irq, softirq and steal; not idle and iowait.
    """
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    fields = [int(f) for f in first.split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")
