"""Skips where nothing can be emulated, unless MLX_LOWBIT_METAL=1 demands it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import emulator


@pytest.fixture(scope="session", autouse=True)
def _emulated() -> None:
    reason = emulator.missing()
    if reason is not None and os.environ.get("MLX_LOWBIT_METAL") != "1":
        pytest.skip(reason)
    assert reason is None, reason
