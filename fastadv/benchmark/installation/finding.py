"""A check of an installation and what it found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

LEFT_OUT = "left out: the time is over"


class Failed(Exception):
    """A check found a fault. ``todo`` is what a user can do about it."""

    def __init__(self, said: str, todo: str) -> None:
        super().__init__(said)
        self.said, self.todo = said, todo


@dataclass(frozen=True)
class Check:
    """``run`` returns what it found in a few words, raises ``Failed``, or returns None where this
    machine has nothing to check; ``seconds`` it usually takes at most."""

    name: str
    run: Callable[[], str | None]
    seconds: float = 2.0


@dataclass(frozen=True)
class Finding:
    """The result of one check: ``passed`` is None if it was left out."""

    name: str
    passed: bool | None
    said: str
    todo: str
    seconds: float

    @property
    def word(self) -> str:
        return {True: "ok", False: "FAIL", None: "-"}[self.passed]


REPORT = "report it with this output, the GPU and the versions of the first lines"
SMALLER = "end other programs on this GPU and run this again"


def findings(checks: Iterable[Check], limit: float = 60.0) -> Iterator[Finding]:
    """Run the checks one after another. One that would end after ``limit`` seconds is left out.
    After an error of the device itself nothing else works in this process: it ends there."""
    until = time.monotonic() + limit
    for check in checks:
        began = time.monotonic()
        if began + check.seconds > until:
            yield Finding(check.name, None, LEFT_OUT, "", 0.0)
            continue
        lost = False
        try:
            said = check.run()
            passed, todo = (None, "") if said is None else (True, "")
        except Failed as fault:
            passed, said, todo = False, fault.said, fault.todo
        except Exception as error:
            # Whatever a broken installation raises is a finding, not a traceback.
            passed, said, todo = False, _first_line(error), _todo(error)
            lost = "CUDA error" in str(error)
        yield Finding(
            check.name, passed, said or "nothing to check", todo, time.monotonic() - began
        )
        if lost:
            yield Finding(
                "further checks", None, "left out: after this error the device is lost", "", 0.0
            )
            return


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}".rstrip(": ")


def _todo(error: Exception) -> str:
    if "out of memory" in str(error):
        return SMALLER
    return REPORT
