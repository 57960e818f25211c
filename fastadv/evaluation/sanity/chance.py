"""What is more than chance, for counts of images."""

from __future__ import annotations

from math import comb

from fastadv.evaluation.intervals import wilson

LEVEL = 0.005  # of a sign test; a report makes a handful of them


def counted(count: int, n: int) -> str:
    """``count`` of ``n`` images, with the interval of the share, in words."""
    return f"{count} of {n} images ({interval(count, n)})"


def interval(count: int, n: int) -> str:
    """The 95 % interval of the share of ``count`` in ``n``, in words."""
    low, high = wilson(count / n, n)
    return f"95 % interval {100 * low:.1f}-{100 * high:.1f} %"


def is_above(count: int, n: int, share: float) -> bool:
    """True if ``count`` of ``n`` images is a larger share than ``share`` beyond chance: the whole
    95 % interval is above."""
    return wilson(count / n, n)[0] > share


def sign_test(lost: int, won: int) -> float:
    """The probability of at least ``lost`` heads in ``lost + won`` throws of a fair coin.

    McNemar's exact test (1947), one-sided: of two attacks on the same images, ``lost`` are fooled
    by the first alone and ``won`` by the second alone.
    """
    throws = lost + won
    return sum(comb(throws, heads) for heads in range(lost, throws + 1)) / 2**throws


def is_weaker(lost: int, won: int) -> bool:
    """True if an attack is weaker beyond chance than one that it should not be weaker than."""
    return sign_test(lost, won) < LEVEL
