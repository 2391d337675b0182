"""Means and percentiles of what was measured."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import EngineError

PERCENTILES = (50, 90, 95, 99)


class Summary(NamedTuple):
    """Of a list of numbers, in their unit."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float


def summarise(values: Sequence[float]) -> Summary | None:
    """Mean and percentiles, between two values in proportion (numpy's default); None of no values."""
    if not len(values):
        return None
    array = np.asarray(values, np.float64)
    return Summary(float(array.mean()), *(float(x) for x in np.percentile(array, PERCENTILES)))


def median(values: Sequence[float]) -> float:
    """Raises EngineError where there is nothing to take it of."""
    if not len(values):
        raise EngineError("nothing was measured.")
    return float(np.median(values))
