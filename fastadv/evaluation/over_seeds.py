"""The score of a method over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist, fmean, stdev

# Student's t at 97.5 %, by degrees of freedom from 1; above, an expansion is exact to 4 digits.
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of one value per seed and their standard deviation (over n-1); None for one seed,
    which says nothing about others."""
    return fmean(values), stdev(values) if len(values) > 1 else None


def interval_of_mean(values: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean over all seeds, from one value for each of some, which are
    taken to be normally distributed (Student's t); None for one seed."""
    mean, deviation = mean_and_deviation(values)
    if deviation is None:
        return None
    half = _quantile(len(values) - 1) * deviation / len(values) ** 0.5
    return mean - half, mean + half


def _quantile(freedom: int) -> float:
    if freedom <= len(_T):
        return _T[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
