"""Medians, percentiles and ratios of repeated timings."""

from __future__ import annotations

from collections.abc import Sequence
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


@dataclass(frozen=True)
class Spread:
    """Median, 10th and 90th percentile of ``count`` values."""

    median: float
    p10: float
    p90: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of ``values`` (at least one)."""
        return cls(
            percentile(values, 0.5), percentile(values, 0.1), percentile(values, 0.9), len(values)
        )

    def times(self, factor: float) -> Spread:
        """All values multiplied by ``factor``, which is positive."""
        return Spread(self.median * factor, self.p10 * factor, self.p90 * factor, self.count)

    def as_row(self) -> dict[str, float]:
        """For a JSON row, to four significant digits."""
        return {
            name: value if name == "count" else float(f"{value:.4g}")
            for name, value in asdict(self).items()
        }


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """The spread of the ratios turn by turn.

    What slows a whole turn (another process, a hot chip) slows both sides of its ratio, so this
    varies less than the ratio of two medians.
    """
    return Spread.of([n / d for n, d in zip(numerators, denominators, strict=True)])
