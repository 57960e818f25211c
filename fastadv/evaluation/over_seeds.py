"""The score of a method over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of one value per seed and their standard deviation (over n-1); None for one seed,
    which says nothing about others."""
    return fmean(values), stdev(values) if len(values) > 1 else None
