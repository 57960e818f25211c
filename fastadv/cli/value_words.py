"""How the command line shows the value of an option, as a user would type it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any


def shown(value: Any) -> str:
    """``on``, ``off`` or ``none``; several values with commas; a small multiple of 1/255 or 0.5/255
    as such a fraction, another number that has many digits as the fraction that it is, else with
    all its digits."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return ",".join(map(shown, value))
    if not isinstance(value, float):
        return str(value)
    steps = value * 255
    # From 51/255 = 0.2 on such a fraction may be a plain decimal number.
    if 0 < steps < 51 and abs(steps - round(steps)) < 1e-9:
        return f"{round(steps)}/255"
    short = f"{value:.4g}"
    if float(short) == value:
        return short
    if 0 < steps < 51 and abs(2 * steps - round(2 * steps)) < 1e-9:
        return f"{round(2 * steps) / 2:g}/255"
    near = Fraction(value).limit_denominator(1000)
    return f"{near.numerator}/{near.denominator}" if float(near) == value else repr(value)
