"""Between two steps of an evaluation: its progress, what is stored, and the end in time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.evaluation.forecast import Forecast
from fastadv.evaluation.tally import Halt, Tally
from fastadv.run.console import Tick

KEEP_EVERY = 5.0  # seconds between two savings of a running pass
SHOW_EVERY = 0.2
ASK_EVERY = 1.0  # seconds between two questions to the other processes


class Deadline:
    """The moment ``minutes`` from now, a number or its text; None: never. Raises ``UserError`` for
    one in the past, and for a text that is no number."""

    def __init__(self, minutes: float | str | None = None) -> None:
        seconds = math.inf if minutes is None else 60 * _number(minutes)
        if not seconds > 0:
            raise UserError(
                f"--time-limit is in minutes and must be a number above 0, not {minutes!r}: 60 is "
                "an hour, and 0.5 are 30 seconds."
            )
        self._began = time.monotonic()
        self._seconds = seconds
        self.is_over = False

    def comes_within(self, seconds: float) -> bool:
        """True if it comes in the next ``seconds``, which are then not begun any more."""
        self.is_over = self.is_over or self.elapsed + seconds >= self._seconds
        return self.is_over

    @property
    def elapsed(self) -> float:
        """The seconds since the beginning."""
        return time.monotonic() - self._began


def _number(text: float | str) -> float:
    """``text`` as a number, nan if it is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


class Watch:
    """Looks at the pass of ``total`` images in this process.

    It raises ``Halt`` when ``asked_to_stop`` in any process, or when the next step would end after
    ``deadline``; calls ``keep`` every ``KEEP_EVERY`` seconds; and ``tick`` with the progress.
    ``images`` is the number of images with verdicts.
    """

    def __init__(
        self,
        asked_to_stop: Callable[[], bool],
        deadline: Deadline,
        keep: Callable[[Tally], None],
        tick: Tick,
        total: int,
    ) -> None:
        self._asked, self._deadline = asked_to_stop, deadline
        self._keep, self._tick, self._total = keep, tick, total
        now = time.monotonic()
        self._kept_at = self._stepped_at = self._shown_at = now
        self._questioned_at = -math.inf
        self._signal = distributed.Signal("stop the evaluation")
        self._forecast: Forecast | None = None
        self.images = 0

    def look(self, tally: Tally, *, after: bool) -> None:
        """To be called before each step, and with ``after`` after a batch."""
        now = time.monotonic()
        last, self._stepped_at = now - self._stepped_at, now
        if after or now - self._shown_at > SHOW_EVERY:
            self._shown_at = now
            self._show(tally)
        if now - self._kept_at > KEEP_EVERY:
            self._keep(tally)
            self._kept_at = self._stepped_at = time.monotonic()
        if self._is_told() or self._deadline.comes_within(0.0 if after else last):
            raise Halt

    def _is_told(self) -> bool:
        if self._asked():
            self._signal.give()
            return True
        now = time.monotonic()
        if now - self._questioned_at < ASK_EVERY:
            return False
        self._questioned_at = now
        return self._signal.is_given()

    def _show(self, tally: Tally) -> None:
        processes = distributed.world_size()
        self.images = min(tally.known * processes, self._total)
        note, left = "", None
        if len(tally.pipelines) == 1:
            (name, pipeline), *_ = tally.pipelines.items()
            if self._forecast is None:
                own = -(-self._total // processes)
                self._forecast = Forecast(tally.ledgers[name], pipeline, own)
            stages = zip(tally.stages[name], self._forecast.shares(), strict=False)
            # PGD and CW alone attack every image, so the images that are wrong before it are
            # unknown, and there is nothing to say yet.
            if tally.spares(name):
                note = " · ".join(f"{stage} {100 * share:.1f} %" for stage, share in stages)
            left = self._forecast.seconds_left()
        self._tick(self.images, note, left)
