"""A learning-rate schedule of the user's own, named ``module:function``."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from fastadv.errors import UserError, brief
from fastadv.models.imported import import_callable
from fastadv.storage.printable import printable

LOOKED_AT = 4  # times in each epoch at which a schedule is asked before training
MOST_LOOKS = 10_000  # in all: a run of very many epochs begins as soon as another


def is_own(schedule: str) -> bool:
    """True if ``schedule`` names code."""
    return ":" in schedule


class OwnSchedule:
    """``name`` of a function f(epoch, epochs) -> factor of the learning rate, for a run of
    ``epochs`` epochs; ``epoch`` is a float, from 0.0 at the first update on.

    Raises ``UserError`` where it cannot be imported, and where in any epoch it fails, gives no
    finite number of at least 0, gives another the second time (a resumed run would be another), or
    gives only 0.
    """

    def __init__(self, name: str, epochs: int) -> None:
        self.name, self.epochs = name, epochs
        self._function: Callable[..., Any] = import_callable(
            name, "schedule", "a function of the epoch and the number of epochs"
        )
        looks = min(epochs * LOOKED_AT, MOST_LOOKS)
        times = [epochs * place / looks for place in range(looks)]
        found = [self(epoch) for epoch in times]
        for epoch, before in zip(times, found, strict=True):
            if self(epoch) != before:
                raise UserError(
                    f"{self._at(epoch)} was {before:g} the first time and is not now: it may "
                    "depend on nothing but the epoch and their number, or no run could go on."
                )
        if not any(found):
            raise UserError(f"--schedule {printable(name)} gives 0 in every epoch: nothing trains.")

    def __call__(self, epoch: float) -> float:
        """The factor of the rate at ``epoch``."""
        try:
            value = self._function(epoch, self.epochs)
        except Exception as error:
            said = f"{type(error).__name__}: {error}".rstrip(".")
            raise UserError(
                f"{self._at(epoch)} failed ({printable(said)}): it is called with the epoch, a "
                "float from 0, and the number of epochs."
            ) from error
        if not isinstance(value, Real) or isinstance(value, bool):
            raise UserError(f"{self._at(epoch)} is {brief(value)}, not a number.")
        if not (math.isfinite(value) and float(value) >= 0):
            raise UserError(
                f"{self._at(epoch)} is {float(value):g}: a factor of the rate is finite and at "
                "least 0."
            )
        return float(value)

    def _at(self, epoch: float) -> str:
        return f"--schedule {printable(self.name)} in epoch {epoch:g} of {self.epochs}"
