"""Confidence intervals of accuracies."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

Z = 1.959963984540054  # 95 % of a normal distribution lie within this many standard deviations


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval (Wilson, 1927) of a probability, given the ``share`` in [0,1] observed in
    ``n`` trials. It lies in [0,1] and has a positive width at 0 and 1."""
    centre = share + Z * Z / (2 * n)
    reach = Z * sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    whole = 1 + Z * Z / n
    return max(0.0, (centre - reach) / whole), min(1.0, (centre + reach) / whole)


class Scores(dict[str, float]):
    """Accuracies in [0,1] by attack name, all on the same ``n`` images; or means of a metric with
    the standard ``deviations`` of its values."""

    def __init__(
        self, scores: Mapping[str, float], n: int, deviations: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(scores)
        self.n = n
        self.deviations = deviations

    def interval(self, attack: str) -> tuple[float, float]:
        """The 95 % interval of one score: Wilson's of an accuracy, that of the normal distribution
        of a mean."""
        if self.deviations is None:
            return wilson(self[attack], self.n)
        reach = Z * self.deviations[attack] / sqrt(self.n)
        return self[attack] - reach, self[attack] + reach
