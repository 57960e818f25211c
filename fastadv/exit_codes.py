"""The exit codes of the commands."""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """A code, with one line about what it means (``meaning``)."""

    meaning: str

    def __new__(cls, code: int, meaning: str) -> ExitCode:
        made = int.__new__(cls, code)
        made._value_ = code
        made.meaning = meaning
        return made

    DONE = 0, "done"
    WRONG = 1, "a fault of fastadv, with a traceback; doctor --gpu: a wrong result"
    MISTAKE = 2, "a mistake, or work that cannot go on; one sentence says why"
    DOUBT = 3, "evaluate --sanity: numbers in doubt; bench --compare: a row is slower"
    GO_ON = 75, "stopped, the work is saved: run it again, train with --resume auto"  # EX_TEMPFAIL
    CTRL_C = 130, "stopped by Ctrl-C; else as 75"


def after_stop(by: str) -> ExitCode:
    """The code of a command that was stopped ``by`` something, such as a signal's name."""
    return ExitCode.CTRL_C if by == "SIGINT" else ExitCode.GO_ON
