"""Errors a user can mend: one sentence with the way out, shown without a traceback."""

import sys
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

# Packages between a line of the user's and one of ours: torch's decorators, and contextlib.
_INSIDE = {"fastadv", "torch", "contextlib"}
_LONGEST = 80  # characters of a value in a sentence


class UserError(ValueError):
    """Something asked for that cannot be done; the message says what and what to do instead."""


class NotThere(UserError):
    """A place from which something is read leads nowhere."""


class NotFiniteError(UserError):
    """A network's outputs are not finite."""


class TrainingError(RuntimeError):
    """Training went wrong (a loss that is not finite); the message names the step."""


class ProcessLost(TrainingError):
    """Another process of the group was killed; the run goes on from its last checkpoint."""


class NotFinite(TrainingError):
    """A loss, a gradient, an update or what the network computes stopped being finite."""


class Interrupted(Exception):
    """The user or the system asked the command to stop; everything is saved. ``by``: the name of
    the signal, or what else has asked."""

    def __init__(self, sentence: str, by: str = "") -> None:
        super().__init__(sentence)
        self.by = by


def brief(value: object) -> str:
    """``value`` as a sentence shows it: its ``repr`` in one line, shortened in the middle."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a user's class, or of a number with too many digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 20]}...{text[-16:]}"


def unknown(
    kind: str, name: object, known: Iterable[str], listed: Iterable[str] | None = None
) -> UserError:
    """The error for an unknown name, with the nearest known name.

    ``kind`` is what was named ("method", "data set"); ``known`` are the names there are. If none is
    near, the message lists them, or those in ``listed`` if they are too many.
    """
    names = sorted(known)
    lower = {each.lower(): each for each in reversed(names)}
    word = name if isinstance(name, str) else brief(name)
    near = get_close_matches(word[:_LONGEST].lower(), lower, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean {lower[near[0]]!r}?"
    elif listed is None:
        hint = f"known: {', '.join(names)}."
    else:
        hint = f"among the {len(names)} known are {', '.join(listed)}."
    return UserError(f"Unknown {kind} {brief(word)}; {hint}")


def warn(sentence: str) -> None:
    """Warn (``UserWarning``) at the line outside of fastadv from which it was called."""
    level, frame = 1, sys._getframe()
    while frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE and frame.f_back:
        level, frame = level + 1, frame.f_back
    warnings.warn(sentence, stacklevel=level)
