"""The result of an evaluation: an accuracy for each attack."""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt

from fastadv.evaluation.intervals import Z, wilson
from fastadv.evaluation.verdicts import Verdicts


class Scores(dict[str, float]):
    """Accuracies in [0,1] by attack name, all on the same ``n`` images, with the ``verdicts`` on
    every image where they are kept; or means of a metric with the standard ``deviations`` of its
    values."""

    def __init__(
        self, scores: Mapping[str, float], n: int, deviations: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(scores)
        self.n = n
        self.verdicts: dict[str, Verdicts] = {}
        self.deviations = deviations

    def interval(self, attack: str) -> tuple[float, float]:
        """The 95 % interval of one score: Wilson's of an accuracy, that of the normal distribution
        of a mean."""
        if self.deviations is None:
            return wilson(self[attack], self.n)
        reach = Z * self.deviations[attack] / sqrt(self.n)
        return self[attack] - reach, self[attack] + reach
