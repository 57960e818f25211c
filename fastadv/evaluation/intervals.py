"""Confidence intervals of accuracies."""

from __future__ import annotations

from math import sqrt

Z = 1.959963984540054  # 95 % of a normal distribution lie within this many standard deviations


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval (Wilson, 1927) of a probability, given the ``share`` in [0,1] observed in
    ``n`` trials. It lies in [0,1] and has a positive width at 0 and 1."""
    centre = share + Z * Z / (2 * n)
    reach = Z * sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    whole = 1 + Z * Z / n
    return max(0.0, (centre - reach) / whole), min(1.0, (centre + reach) / whole)
