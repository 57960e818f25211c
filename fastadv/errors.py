"""Errors a user can mend: one sentence with the way out, shown without a traceback."""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

# Packages between a line of the user's and one of ours: torch's decorators, and contextlib.
_INSIDE = {"fastadv", "torch", "contextlib"}


class UserError(ValueError):
    """Something asked for that cannot be done; the message says what and what to do instead."""


class NotFiniteError(UserError):
    """A network's outputs are not finite."""


class TrainingError(RuntimeError):
    """Training went wrong (a loss that is not finite); the message names the step."""


class NotFinite(TrainingError):
    """A loss, a gradient, an update or what the network computes stopped being finite."""


class Interrupted(Exception):
    """The user or the system asked the command to stop; everything is saved."""


def unknown(
    kind: str, name: object, known: Iterable[str], listed: Iterable[str] | None = None
) -> UserError:
    """The error for an unknown name, with the nearest known name.

    ``kind`` is what was named ("method", "data set"); ``known`` are the names there are. If none is
    near, the message lists them, or those in ``listed`` if they are too many.
    """
    names = sorted(known)
    lower = {each.lower(): each for each in reversed(names)}
    near = get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {lower[near[0]]!r}?"
    elif listed is None:
        hint = f"known: {', '.join(names)}."
    else:
        hint = f"among the {len(names)} known are {', '.join(listed)}."
    return UserError(f"Unknown {kind} {str(name)!r}; {hint}")


def warn(sentence: str) -> None:
    """Warn (``UserWarning``) at the line outside of fastadv from which it was called."""
    level, frame = 1, sys._getframe()
    while frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE and frame.f_back:
        level, frame = level + 1, frame.f_back
    warnings.warn(sentence, stacklevel=level)
