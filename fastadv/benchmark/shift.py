"""How many times longer something takes in one run than in another, with an interval.

The turns of one run are compared with those of another, each with each (Hodges and Lehmann): the
estimate is the median of all ratios, and the interval is the one that belongs to the test of Mann
and Whitney, with its exact distribution. It holds for times of any distribution that differ between
the runs by a factor, so a few turns that were disturbed do not widen it much. It covers the spread
of the turns in both runs and nothing else: not a machine that is in another state in one of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

LEVEL = 0.95
THRESHOLD = 1.05
"""A row is slower if the whole interval of its ratio is above this. Two processes on an idle
machine differ by some percent more than their turns do: memory lies elsewhere, clocks change."""


@dataclass(frozen=True)
class Ratio:
    """New over old, and its interval (None: too few turns; ``LEVEL`` needs four and four)."""

    value: float
    low: float | None
    high: float | None


def ratio_of(new: Sequence[float], old: Sequence[float], level: float = LEVEL) -> Ratio:
    """The ratio of two runs' times, all positive, with its interval at ``level``."""
    logs = sorted(math.log(mine / other) for mine in new for other in old)
    middle = (logs[(len(logs) - 1) // 2] + logs[len(logs) // 2]) / 2
    cut = _left_out(len(new), len(old), level)
    if cut == 0:
        return Ratio(math.exp(middle), None, None)
    return Ratio(math.exp(middle), math.exp(logs[cut - 1]), math.exp(logs[-cut]))


def together(level: float, count: int) -> float:
    """The level of each of ``count`` intervals that hold all at once with probability ``level``
    (Bonferroni): of many rows that are compared, one is outside its own interval by chance."""
    return 1 - (1 - level) / max(1, count)


@cache
def _left_out(new: int, old: int, level: float) -> int:
    """The position, from each end of the sorted ratios, of the interval's ends; 0 if there is no
    interval."""
    ways, total, below = _ways(new, old), math.comb(new + old, new), 0
    for cut, count in enumerate(ways):
        below += count
        if 2 * below > (1 - level) * total:
            return cut
    return 0


@cache
def _ways(new: int, old: int) -> list[int]:
    """How many of the orders of ``new`` and ``old`` values have 0, 1, 2, ... pairs in which the
    value of the first is the smaller one."""
    # Coefficients of the Gaussian binomial coefficient, one factor at a time.
    size = new * old
    ways = [1] + [0] * size
    for part in range(1, new + 1):
        for place in range(size, old + part - 1, -1):
            ways[place] -= ways[place - old - part]
        for place in range(part, size + 1):
            ways[place] += ways[place - part]
    return ways
