"""The position of a step in its run: calls and epochs."""

from __future__ import annotations


class Clock:
    """``calls`` is the number of calls that stepped the optimizer. ``steps_per_epoch`` counts these
    calls; it is None if the caller names the epochs (``set_epoch``)."""

    def __init__(self, steps_per_epoch: int | None, updates_per_batch: int) -> None:
        self.calls = 0
        self.steps_per_epoch = steps_per_epoch
        self.updates_per_batch = updates_per_batch
        self.named_epoch: int | None = None  # the epoch that the caller set last

    @property
    def update(self) -> int:
        """The number of updates so far; one call may make several."""
        return self.calls * self.updates_per_batch

    @property
    def epoch(self) -> float:
        """The position in the run in epochs, with a fraction if the length of an epoch is known."""
        if self.steps_per_epoch:
            return self.calls / self.steps_per_epoch
        return float(self.named_epoch or 0)

    @property
    def knows_epochs(self) -> bool:
        """True if the length of an epoch is known or the caller has named an epoch."""
        return bool(self.steps_per_epoch) or self.named_epoch is not None

    def begin(self, epoch: int) -> int | None:
        """Begin the epoch that the caller names. Returns the epoch that ended with it, or None."""
        before, self.named_epoch = self.named_epoch, epoch
        if not self.steps_per_epoch and before is not None and epoch > before:
            return before
        return None

    def ended(self) -> int | None:
        """The epoch that ended with the last call, or None; None also if the length of an epoch is
        unknown."""
        length = self.steps_per_epoch
        if length and self.calls and self.calls % length == 0:
            return self.calls // length - 1
        return None
