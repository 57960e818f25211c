"""Signals ask a run to save and stop."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

from fastadv.run.epoch_loop import EpochLoop

FORWARDED_SIGNAL_SECONDS = 2.0


@contextmanager
def stopping_on_signals(runner: EpochLoop) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the run to save and stop, a second one ends it at once.

    A SIGTERM within ``FORWARDED_SIGNAL_SECONDS`` of the first signal is ignored: torchrun forwards
    a signal that its workers have already received.
    """
    asked = 0.0

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if not runner.stop_requested:
            runner.stop_requested, asked = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - asked > FORWARDED_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    try:
        previous = {
            number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:
        yield  # not in the main thread, which alone may handle signals
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
