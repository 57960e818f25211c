"""Medians, percentiles and ratios of repeated timings."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass


def percentile(values: Sequence[float], share: float) -> float:
    """The ``share`` quantile (0 to 1) of ``values``, with linear interpolation."""
    if not values:
        raise ValueError("no values to take a percentile of")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def median_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The interval between two of ``values`` that contains the median of their distribution with
    probability ``level``, whatever the distribution; None for too few values (95 % need six)."""
    ordered, count = sorted(values), len(values)
    outside, below = 0.0, -1  # the probability that fewer than ``below + 1`` values are under it
    while True:
        outside += math.comb(count, below + 1) / 2**count
        if 2 * outside > 1 - level or below + 1 >= count:
            break
        below += 1
    return None if below < 0 else (ordered[below], ordered[count - 1 - below])


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of ``count`` values, and the median's 95 % interval (None:
    fewer than six values have none)."""

    median: float
    p10: float
    p90: float
    count: int
    low95: float | None = None
    high95: float | None = None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of ``values`` (at least one)."""
        low, high = median_interval(values) or (None, None)
        median, p10, p90 = (percentile(values, share) for share in (0.5, 0.1, 0.9))
        return cls(median, p10, p90, len(values), low, high)

    def times(self, factor: float) -> Spread:
        """All values multiplied by ``factor``, which is positive."""
        return self._changed(lambda value: value * factor)

    def into(self, numerator: float) -> Spread:
        """``numerator`` divided by each value: a rate from times. All are positive."""
        turned = self._changed(lambda value: numerator / value)
        return Spread(
            turned.median, turned.p90, turned.p10, self.count, turned.high95, turned.low95
        )

    def _changed(self, change: Callable[[float], float]) -> Spread:
        low, high = self.low95, self.high95
        return Spread(
            change(self.median),
            change(self.p10),
            change(self.p90),
            self.count,
            None if low is None else change(low),
            None if high is None else change(high),
        )

    def as_row(self) -> dict[str, float | None]:
        """For a JSON row, to four significant digits."""
        return {
            name: value if name == "count" or value is None else float(f"{value:.4g}")
            for name, value in asdict(self).items()
        }


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of the ratios turn by turn.

    What slows a whole turn (another process, a hot chip) slows both sides of its ratio, so this
    varies less than the ratio of two medians.
    """
    return Spread.of([n / d for n, d in zip(numerators, denominators, strict=True)])
