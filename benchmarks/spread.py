"""What times of one thing come to, without anything that has to be installed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def median_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The median, and half the spread over it."""
    median = statistics.median(values)
    return median, (max(values) - min(values)) / 2 / median
