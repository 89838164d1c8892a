"""What the tests of layers share."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture
def count(monkeypatch):
    """The products that ran, by op."""
    calls = []
    ops = sys.modules["mlx_lowbit.ops"]
    for name in ("quantized_matmul", "qqmm", "gather_qmm", "gather_qqmm"):
        own = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, own=own, name=name, **k: (calls.append(name), own(*a, **k))[1]
        )
    return calls
