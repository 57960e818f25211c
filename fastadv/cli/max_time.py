"""The option ``--max-time``."""

from __future__ import annotations

import re

from fastadv.errors import UserError

_CLOCK = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>[0-5]\d):(?P<seconds>[0-5]\d)")
_UNIT = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)(?P<unit>[smhd])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds_of(text: str) -> float:
    """The seconds that ``text`` says: 23:30:00, 1-12:00:00 (days first), 90m or 20s. Raises
    ``UserError``."""
    given = text.strip().lower()
    found = 0.0
    if clock := _CLOCK.fullmatch(given):
        days, hours, minutes, seconds = (int(part or 0) for part in clock.groups())
        found = 86400.0 * days + 3600 * hours + 60 * minutes + seconds
    elif unit := _UNIT.fullmatch(given):
        found = float(unit["number"]) * _SECONDS[unit["unit"]]
    if not 0 < found < 1e9:
        raise UserError(
            f"--max-time is a time such as 23:30:00, 1-12:00:00, 90m or 20s, not {text!r}."
        )
    return found
