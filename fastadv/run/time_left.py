"""How long a run still takes."""

from __future__ import annotations

import time
from collections.abc import Callable


class TimeLeft:
    """Estimates from what this process has done: whole epochs, with their evaluation, and within
    the first one its batches.

    ``epochs`` of ``batches`` are the whole run; ``done`` epochs and ``within`` batches of the next
    one were trained before.
    """

    def __init__(
        self,
        epochs: int,
        batches: int,
        done: int = 0,
        within: int = 0,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._epochs, self._batches, self._now = epochs, batches, now
        self._before = done + within / batches
        self._within = within
        self._began = now()
        self._ended: tuple[float, float] | None = None  # epochs ended, when

    def epoch_ends(self, epochs: int) -> None:
        """``epochs`` epochs of the run are trained and evaluated."""
        if epochs > self._before:  # or this process trained none of it
            self._ended = (float(epochs), self._now())

    @property
    def knows_evaluation(self) -> bool:
        """True if an epoch with its evaluation has been measured."""
        return self._ended is not None

    def after(self, epoch: int, batch: int) -> float | None:
        """The seconds left after ``batch`` batches of ``epoch`` (from 0); without evaluations
        before the first epoch has ended. None where nothing is known yet."""
        position = epoch + batch / self._batches
        now = self._now()
        if self._ended is not None:
            ended, when = self._ended
            each = (when - self._began) / (ended - self._before)
            # The epoch in progress has taken what it has taken.
            return max(0.0, each * (self._epochs - ended) - (now - when))
        trained = position - self._before
        if trained <= 0:
            return None
        return (now - self._began) / trained * (self._epochs - position)
