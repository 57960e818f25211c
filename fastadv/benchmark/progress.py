"""How far a benchmark is and how long it still takes, on the terminal or in its log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from fastadv.printing.layout import columns

BETWEEN_LINES = 30.0  # seconds, where the output is a file


def time_words(seconds: float) -> str:
    """A duration to plan with."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class Estimate:
    """The time left of a comparison of ``candidates`` in ``turns`` interleaved turns."""

    def __init__(self, candidates: int, turns: int, now: Callable[[], float] = time.monotonic):
        self.candidates, self.turns, self._now = candidates, turns, now
        self.began, self.built, self.turn_seconds = now(), 0, 0.0
        self._interleaved: float | None = None

    def candidate(self, name: str, turn_seconds: float | None) -> str:
        """The next candidate is built; ``turn_seconds`` is what a turn of the last one took."""
        self.built += 1
        self.turn_seconds += turn_seconds or 0.0
        done = self.built - 1
        said = f"warming up {name}, {self.built} of {self.candidates}"
        if not done:
            return said
        each = (self._now() - self.began) / done + self.turns * self.turn_seconds / done
        left = each * self.candidates - (self._now() - self.began)
        return f"{said}; about {time_words(max(left, 0.0))} left"

    def turn(self, number: int, last: float | None) -> str:
        """Turn ``number`` (from 0) begins; the last candidate's turn alone took ``last``."""
        if self._interleaved is None:
            self._interleaved = self._now()
            self.turn_seconds += last or 0.0
        gone = self._now() - self._interleaved
        each = gone / number if number else self.turn_seconds
        left = each * (self.turns - number)
        return f"turn {number + 1} of {self.turns}; about {time_words(left)} left"


def progress() -> Callable[[str], None]:
    """A function that shows a sentence: on a terminal on one line that the next one replaces, in a
    file as a line, at most one in ``BETWEEN_LINES``. An empty sentence clears the line."""
    last = -BETWEEN_LINES

    def say(sentence: str) -> None:
        nonlocal last
        if sys.stderr.isatty():
            width = columns() - 1
            print(f"\r\033[K{sentence[:width]}", end="", file=sys.stderr, flush=True)
        elif sentence and time.monotonic() - last >= BETWEEN_LINES:
            last = time.monotonic()
            print(sentence, file=sys.stderr, flush=True)

    return say
