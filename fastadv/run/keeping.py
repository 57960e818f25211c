"""``--keep``: which weights and checkpoints a run leaves in its folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastadv.errors import UserError, unknown

_WORDS = ("best", "last", "previous", "every-N")
_EVERY = re.compile(r"every-([1-9][0-9]{0,8})")


@dataclass(frozen=True)
class Kept:
    """``best``: best.pt, the weights of the best epoch.

    ``last``: last.pt, from which the run continues. It is written in any case; without ``last`` it
    is removed, with the checkpoint before, once the run has finished.
    ``previous``: previous.pt, the checkpoint before last.pt, for the case that this is damaged.
    ``every``: epochs from one file of weights in epochs/ to the next, or None.
    """

    best: bool
    last: bool
    previous: bool
    every: int | None

    def keeps(self, epoch: int) -> bool:
        """True if the weights after ``epoch`` (from 1) go to epochs/."""
        return self.every is not None and epoch % self.every == 0


def kept(words: Sequence[str]) -> Kept:
    """What the ``words`` of ``--keep`` say. Raises ``UserError`` for any other."""
    every = None
    for word in words:
        found = _EVERY.fullmatch(word)
        if found is None and word.startswith("every"):
            raise UserError(
                f"--keep every-N takes a whole number of epochs such as every-10, not {word!r}."
            )
        if found is None and word not in _WORDS[:3]:
            raise unknown("word in --keep", word, _WORDS)
        if found is not None:
            if every is not None:
                raise UserError("--keep takes one every-N, such as every-10.")
            every = int(found[1])
    if not words:
        raise UserError("--keep must keep something: best, last or every-10, such as best,last.")
    return Kept("best" in words, "last" in words, "previous" in words, every)
