"""How the command line shows the value of an option, as a user would type it."""

from __future__ import annotations

from typing import Any


def shown(value: Any) -> str:
    """``on``, ``off`` or ``none``; several values with commas; a small multiple of 1/255 as such a
    fraction, other numbers with all their digits."""
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
    return short if float(short) == value else repr(value)
