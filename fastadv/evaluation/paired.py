"""Two networks on the same images: is one of them better?

Images that both networks get right, or both get wrong, say nothing about the difference. It rests
on the others, which only one of them gets right, so it is known more precisely than from the two
accuracies with their intervals.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, exp, floor, fsum, lgamma, log, log10, sqrt

import numpy as np

from fastadv.errors import UserError
from fastadv.evaluation.intervals import Z, wilson
from fastadv.evaluation.verdicts import Verdicts
from fastadv.storage.printable import printable

Z_POWER = 0.8416212335729143  # 80 % of a normal distribution lie below
ALPHA = 0.05

_MUST_AGREE = {
    "attack": "evaluate both under the same attack",
    "norm": "compare runs of one norm",
    "eps": "evaluate both with the same --eps",
    "alpha": "evaluate both with the same --alpha",
    "precision": "evaluate both in the same precision",
}
"""Facts that must be the same, and the way out."""


@dataclass(frozen=True)
class Paired:
    """Numbers of images: ``both`` networks right, ``first`` only, ``second`` only, ``neither``."""

    both: int
    first: int
    second: int
    neither: int

    @classmethod
    def of(cls, first: Verdicts, second: Verdicts) -> Paired:
        """The counts of two verdicts. Raises ``UserError`` unless they are on the same images in
        the same order, under the same attack with the same numbers."""
        require_comparable(first, second)
        a, b = first.right, second.right
        table = (a & b, a & ~b, ~a & b, ~(a | b))
        return cls(*(int(np.count_nonzero(each)) for each in table))

    @property
    def n(self) -> int:
        """The number of images."""
        return self.both + self.first + self.second + self.neither

    @property
    def difference(self) -> float:
        """The accuracy in [0,1] of the first network minus that of the second."""
        return (self.first - self.second) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the difference: method 10 of Newcombe (1998), Improved confidence
        intervals for the difference between binomial proportions based on paired data.

        The distances from each accuracy to the ends of its Wilson interval are added as squares,
        less what the correlation of the two networks takes away.
        """
        n, difference = self.n, self.difference
        one, other = self.both + self.first, self.both + self.second
        p, q = one / n, other / n
        (p_low, p_high), (q_low, q_high) = wilson(p, n), wilson(q, n)
        phi = self._correlation(one, other)

        def reach(mine: float, its: float) -> float:
            return sqrt(max(0.0, mine * mine - 2 * phi * mine * its + its * its))

        low = difference - reach(p - p_low, q_high - q)
        return low, difference + reach(p_high - p, q - q_low)

    def _correlation(self, one: int, other: int) -> float:
        """phi of the table, corrected for continuity where it is positive (method 10)."""
        n = self.n
        margins = one * (n - one) * other * (n - other)
        if margins == 0:
            return 0.0
        product = self.both * self.neither - self.first * self.second
        corrected = max(product - n / 2, 0.0) if product > 0 else float(product)
        return corrected / sqrt(margins)

    @property
    def p_value(self) -> float:
        """McNemar's exact test: the probability that a fair coin, tossed once for each image that
        one network alone gets right, falls as unevenly or more so. Two-sided."""
        tosses, fewer = self.first + self.second, min(self.first, self.second)
        if 2 * fewer == tosses:
            return 1.0
        constant = lgamma(tosses + 1) - tosses * log(2)
        tail = fsum(
            exp(constant - lgamma(k + 1) - lgamma(tosses - k + 1)) for k in range(fewer + 1)
        )
        return min(1.0, 2 * tail)

    @property
    def is_told(self) -> bool:
        """True if these images tell a difference: p below 0.05. The exact test is the stricter of
        the two: 0 is not in the interval then."""
        return self.p_value < ALPHA

    @property
    def images_needed(self) -> int | None:
        """How many images tell such a difference at the 5 % level four times out of five (Connor
        1987, Sample size for testing differences in proportions for the paired-sample design);
        None where there is none to tell."""
        difference = abs(self.difference)
        if difference == 0:
            return None
        apart = (self.first + self.second) / self.n
        reach = Z * sqrt(apart) + Z_POWER * sqrt(apart - difference * difference)
        return ceil((reach / difference) ** 2)

    def sentence(self, first: str, second: str) -> str:
        """The result in words; ``first`` and ``second`` are what the networks are called."""
        low, high = (100 * end for end in self.interval)
        points = 100 * self.difference
        if points < 0:
            first, points, low, high = second, -points, -high, -low
        if points == 0:
            found = f"{first} and {second} are equal"
        else:
            found = f"{first} is {points:.2f} points higher"
        evidence = f"95 % interval {low:.2f} to {high:.2f}, p {_probability(self.p_value)}"
        return f"{found} ({evidence}, {self.n:,} images): {self._conclusion()}"

    def _conclusion(self) -> str:
        if self.is_told:
            return "a difference"
        told = "no difference can be told from these images"
        if self.images_needed is None:
            return told
        return f"{told}; about {_rounded_up(self.images_needed):,} images would be needed"


def require_comparable(first: Verdicts, second: Verdicts) -> None:
    """Raise ``UserError`` unless both are verdicts on the same images under the same attack."""
    same = np.array_equal(first.index, second.index) and np.array_equal(first.label, second.label)
    if first.facts["images"] != second.facts["images"]:
        raise UserError(
            "The two networks were evaluated on other images, so they cannot be compared image by "
            "image; evaluate both on the same data set."
        )
    if not same:
        raise UserError(
            f"The two networks were evaluated on {len(first):,} and {len(second):,} images of the "
            "same set that are not the same ones; evaluate both with the same --limit."
        )
    for name, way_out in _MUST_AGREE.items():
        one, other = first.facts.get(name), second.facts.get(name)
        if one != other:
            raise UserError(
                f"The two networks were evaluated with {name} {_shown(one)} and {_shown(other)}, "
                f"which cannot be compared; {way_out}."
            )


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _probability(p: float) -> str:
    if p < 0.001:
        return "< 0.001"
    return f"= {p:.3f}" if p < 0.1 else f"= {p:.2f}"


def _rounded_up(count: int) -> int:
    """``count`` with two digits that count."""
    unit = 10 ** max(0, floor(log10(count)) - 1)
    return -(-count // unit) * unit
