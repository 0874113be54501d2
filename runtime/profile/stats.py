"""Many timings of one thing as the three figures that are reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Summary:
    """Seconds of something that was timed ``count`` times; percentiles interpolate between neighbours."""

    median: float
    p90: float
    p99: float
    count: int

    @staticmethod
    def of(seconds: Sequence[float]) -> Summary:
        """Sum up one timing or more."""
        median, p90, p99 = (float(value) for value in np.percentile(np.asarray(seconds, np.float64), (50, 90, 99)))
        return Summary(median, p90, p99, len(seconds))
