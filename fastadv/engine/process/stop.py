"""Signals, and the end of the time that is allowed, ask a command to save and stop.

SIGTERM, SIGUSR1, SIGUSR2, SIGHUP, SIGXCPU, SIGINT and the end of ``allow``'s time are treated
alike. The first one asks. Within ``held`` there is something to save: the code there looks at
``asked`` and stops in order. Elsewhere nothing is lost, and ``Stopped`` is raised at once. A second
signal raises ``Stopped`` everywhere.

Imports nothing that takes time: a command handles signals before it imports torch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from fastadv.engine.process.beginning import began_at
from fastadv.engine.process.one_voice import first_to_speak
from fastadv.exit_codes import ExitCode, after_stop

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")  # Windows has two of them
MAX_TIME = "--max-time"
GRACE = 3.0  # seconds to the next look at ``asked``, after which a pass is interrupted
FORWARDED = 2.0  # seconds in which launchers send a signal again that this process has received
IMPORTING = 0.05  # seconds to wait for the end of an import
RESERVE = 30.0  # seconds of the allowed time that are kept for saving
RESERVED_SHARE = 0.1  # of the allowed time at most

_STARTED = time.time()


class Stopped(BaseException):
    """Asked to stop by ``by``, a signal's name or ``MAX_TIME``, with nothing to save.

    No ``KeyboardInterrupt``, of which the library of the command line makes an exit code.
    """

    def __init__(self, by: str) -> None:
        super().__init__(by)
        self.by = by


class _Here:
    """What was told within one outermost ``handled`` block; nothing of it outlives the block."""

    asked: str | None = None
    at = 0.0  # time.monotonic()
    insists = False  # a second signal
    handled = 0  # nested ``handled`` blocks
    held = 0
    interruptible = 0
    grace = GRACE

    def __init__(self, command: bool = False) -> None:
        self.command = command  # the process ends with it
        self.may_exit = command  # a command before it has made anything

    until: float | None = None  # time.time()
    longest_save = 0.0
    allowed = 0.0
    progressed = False


_here = _Here()


def asked() -> str | None:
    """What has asked this process to stop: the name of a signal, or ``MAX_TIME``."""
    return _here.asked


def insists() -> bool:
    """True after a second signal: the command is to end without saving."""
    return _here.insists


def waited() -> float:
    """The seconds since it was asked."""
    return time.monotonic() - _here.at if _here.asked else 0.0


@contextmanager
def handled(*, command: bool = False) -> Iterator[None]:
    """Handle the signals within this block; those that the parent has ignored stay so.

    ``command``: as long as ``something_exists`` was not called, a signal during an import ends the
    process at once, since what is half imported cannot be left by an exception. Blocks may be
    nested. Outside of the main thread, which alone may handle signals, nothing happens.
    """
    global _here
    outer = _here
    previous: dict[int, Any] = {}
    if not outer.handled:
        _here = _Here(command)
        try:
            for number in _numbers():
                if signal.getsignal(number) is not signal.SIG_IGN:
                    previous[number] = signal.signal(number, _on_signal)
        except ValueError:
            previous.clear()
    _here.handled += 1
    try:
        yield
    finally:
        _here.handled -= 1
        if previous:
            _alarm_in(0.0)
            for number, handler in previous.items():
                signal.signal(number, handler)
        _here = outer


@contextmanager
def held() -> Iterator[None]:
    """Within this block a signal is only noted: its code looks at ``asked``."""
    here = _here
    here.held += 1
    try:
        yield
    finally:
        here.held -= 1


class interruptible:
    """Within this block in ``held`` an exception loses nothing: ``Stopped`` is raised ``grace``
    seconds after a signal. (A class: a generator's frames would widen the block.)"""

    def __init__(self, grace: float = GRACE) -> None:
        self._grace = grace

    def __enter__(self) -> None:
        self._here = here = _here
        self._before = here.grace
        here.grace = self._grace
        here.interruptible += 1
        if here.asked is not None and waited() < self._grace:
            _alarm_in(self._grace - waited())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._here.interruptible -= 1
        self._here.grace = self._before


def ending() -> None:
    """The command ends with an error, which a first signal no longer takes the place of."""
    _here.held += 1


def something_exists() -> None:
    """The command has made files: it is no longer ended in the middle of an import."""
    _here.may_exit = False


def note_progress() -> None:
    """The command has done something that its next call does not have to do again."""
    _here.progressed = True


def progressed() -> bool:
    """True if the next call of the same command gets further than this one."""
    return _here.progressed


# -- the time that is allowed ---------------------------------------------------------------------


def allow(seconds: float) -> None:
    """Ask to stop so early that saving ends ``seconds`` after the start of this process, or of the
    torchrun that has started it. To be called within ``handled``."""
    _here.allowed = seconds
    _here.until = started() + seconds
    _arm()


def saved_in(seconds: float) -> None:
    """A save took ``seconds``: as much, with a margin, is kept of the allowed time."""
    if seconds > _here.longest_save:
        _here.longest_save = seconds
        if _here.asked is None:
            _arm()


def _arm() -> None:
    if _here.until is None:
        return
    reserve = min(RESERVE + 3 * _here.longest_save, RESERVED_SHARE * _here.allowed)
    _alarm_in(max(1e-3, _here.until - reserve - time.time()))


def started() -> float:
    """The moment (``time.time``) at which this process was started; with torchrun, which starts
    processes again, that of its own start."""
    pid = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    found = began_at(pid)
    return _STARTED if found is None else found


# -- signals --------------------------------------------------------------------------------------


def _numbers() -> list[int]:
    names = [*NAMES, "SIGALRM"]
    return [getattr(signal, name) for name in names if hasattr(signal, name)]


def _alarm_in(seconds: float) -> None:
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _on_signal(number: int, frame: FrameType | None) -> None:
    here = _here
    if number == getattr(signal, "SIGALRM", None):
        if here.asked is None and here.until is not None:
            _ask(MAX_TIME, frame)
        elif here.asked is not None:
            _end(frame)
        return
    if here.asked is None:
        _ask(signal.Signals(number).name, frame)
        return
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    if waited() < FORWARDED and (number != signal.SIGINT or by_torchrun):
        return
    here.insists = True
    _end(frame)


def _ask(by: str, frame: FrameType | None) -> None:
    here = _here
    here.asked, here.at = by, time.monotonic()
    if not here.held:
        _end(frame)
    elif here.interruptible:
        _alarm_in(max(here.grace, 1e-3))


def _end(frame: FrameType | None) -> None:
    """Raise ``Stopped`` where that may be done."""
    here = _here
    if here.asked is None or (here.held and not here.interruptible and not here.insists):
        return
    if _imports(frame):
        if here.may_exit:
            said, code = said_and_code(here.asked, nothing_saved(here.asked))
            if first_to_speak():
                os.write(2, f"{said}\n".encode())
            os._exit(code)
        _alarm_in(IMPORTING)
        return
    if here.command and "logging" in sys.modules:  # torch's compiler warns that it was interrupted
        sys.modules["logging"].disable()
    raise Stopped(here.asked)


def _imports(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def nothing_saved(by: str) -> str:
    """The sentence of a command that was stopped before there was anything to save."""
    return f"Stopped by {by}; there is nothing to save yet: start it again."


def said_and_code(by: str, sentence: str) -> tuple[str, ExitCode]:
    """What a command that was stopped ``by`` something says, usually ``sentence``, and its code.

    One for which ``--max-time`` has left no time after its start would end in the same way for
    ever: that is a mistake. Processes that torchrun has started again count its time from before.
    """
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if by != MAX_TIME or progressed() or again:
        return sentence, after_stop(by)
    took = time.time() - started() - waited()
    return (
        f"Stopped by --max-time {took:.0f} s after the start, before anything was trained or "
        "evaluated: the start alone takes as long, and the same command would end like this again. "
        "Give a longer --max-time."
    ), ExitCode.MISTAKE


def quiet_interpreter() -> None:
    """An interrupt that comes where Python cannot raise it leaves no traceback either."""
    usual = sys.unraisablehook

    def hook(found: Any) -> None:
        if not isinstance(found.exc_value, (KeyboardInterrupt, Stopped)):
            usual(found)

    sys.unraisablehook = hook
