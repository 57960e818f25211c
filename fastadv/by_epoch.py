"""Values that change with the epoch: ramps, phases and points, as Python and as text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from fastadv.errors import UserError

__all__ = ["ByEpoch", "Phases", "Points", "Ramp", "read"]


@dataclass(frozen=True)
class Ramp:
    """Rises or falls linearly from ``start`` to ``end`` over the first ``epochs`` epochs, and stays
    at ``end``. As text: "0..8/255@15"."""

    start: float
    end: float
    epochs: float

    def __post_init__(self) -> None:
        if not self.epochs > 0:
            raise UserError(f"A ramp takes more than 0 epochs, not {self.epochs}.")

    def at(self, epoch: float) -> float:
        """The value at ``epoch``, the position in the run in epochs, with a fraction."""
        done = min(max(epoch / self.epochs, 0.0), 1.0)
        return self.start + (self.end - self.start) * done

    def values(self) -> list[float]:
        """The values that bound all others."""
        return [self.start, self.end]

    def __str__(self) -> str:
        return f"{self.start!r}..{self.end!r}@{self.epochs:g}"


@dataclass(frozen=True)
class Phases:
    """Constant from one epoch to the next: ``Phases({0: 2, 30: 5})`` is 2 before epoch 30, counted
    from 0, and 5 from then on. As text: "2@0,5@30"."""

    steps: tuple[tuple[float, float], ...]  # (first epoch, value), in rising order

    def __init__(self, steps: Mapping[float, float] | Iterable[tuple[float, float]]) -> None:
        pairs = steps.items() if isinstance(steps, Mapping) else steps
        try:
            found = tuple(sorted((float(epoch), value) for epoch, value in pairs))
        except (TypeError, ValueError):
            raise UserError(
                f"Phases are epoch -> value, such as {{0: 2, 30: 5}}, not {steps!r}."
            ) from None
        if not found or found[0][0] != 0:
            raise UserError(
                "Phases begin with epoch 0: Phases({0: 2, 30: 5}), or 2@0,5@30 as text."
            )
        if len({epoch for epoch, _ in found}) < len(found):
            raise UserError("Two phases begin with the same epoch.")
        object.__setattr__(self, "steps", found)

    def at(self, epoch: float) -> float:
        """The value at ``epoch``, the position in the run in epochs, with a fraction."""
        return next(value for first, value in reversed(self.steps) if epoch >= first)

    def values(self) -> list[float]:
        """All values."""
        return [value for _, value in self.steps]

    def __str__(self) -> str:
        return ",".join(f"{value!r}@{epoch:g}" for epoch, value in self.steps)


@dataclass(frozen=True)
class Points:
    """Straight lines between points, and constant after the last: ``Points({0: 0, 5: 0.1, 30: 0})``
    rises from 0 to 0.1 over five epochs and falls to 0 until epoch 30. As text:
    "0@0,0.1@5,0@30"."""

    points: tuple[tuple[float, float], ...]  # (epoch, value), in rising order

    def __init__(self, points: Mapping[float, float] | Iterable[tuple[float, float]]) -> None:
        pairs = points.items() if isinstance(points, Mapping) else points
        found = tuple((float(epoch), float(value)) for epoch, value in pairs)
        epochs = [epoch for epoch, _ in found]
        if not epochs or epochs[0] != 0 or any(b <= a for a, b in pairwise(epochs)):
            raise UserError(
                f"The points {','.join(f'{v:g}@{e:g}' for e, v in found)} (value@epoch) must begin "
                "with epoch 0, and each epoch be later than the one before: 0@0,0.1@5,0@30."
            )
        object.__setattr__(self, "points", found)

    def at(self, epoch: float) -> float:
        """The value at ``epoch``, the position in the run in epochs, with a fraction."""
        for (begin, low), (end, high) in pairwise(self.points):
            if epoch < end:
                return low + (high - low) * (epoch - begin) / (end - begin)
        return self.points[-1][1]

    def values(self) -> list[float]:
        """The values that bound all others."""
        return [value for _, value in self.points]

    def __str__(self) -> str:
        return ",".join(f"{value!r}@{epoch:g}" for epoch, value in self.points)


ByEpoch = Ramp | Phases
"""A value that changes with the epoch."""


def read(name: str, text: str) -> tuple[str, list[tuple[str, str]]] | None:
    """The pieces of a ramp or of phases as text, or None for another text.

    ("ramp", [(start, end), (epochs, "")]) for "0..8/255@15", ("phases", [(epoch, value), ...]) for
    "2@0,5@30". Raises ``UserError`` for a text that is neither although it has an @; ``name`` is
    the option's.
    """
    if "@" not in text:
        return None
    if ".." in text:
        values, _, epochs = text.partition("@")
        start, _, end = values.partition("..")
        if start and end and epochs and "@" not in epochs:
            return "ramp", [(start.strip(), end.strip()), (epochs.strip(), "")]
    else:
        pairs = [entry.partition("@") for entry in text.split(",")]
        if all(value and epoch for value, _, epoch in pairs):
            return "phases", [(epoch.strip(), value.strip()) for value, _, epoch in pairs]
    raise UserError(
        f"{name} is a number, a ramp such as 0..8/255@15 (from..to@epochs), or phases such as "
        f"2@0,5@30 (value@epoch), not {text!r}."
    )
