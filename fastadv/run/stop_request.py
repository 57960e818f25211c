"""Whether a run was asked to stop; several processes agree on the batch after which they do."""

from __future__ import annotations

import time

import torch

from fastadv.engine.process import distributed, stop

ASK_EVERY = 2.0  # seconds between two questions of several processes whether one was told to stop


class StopRequest:
    """``by``: what has asked this run to stop, None as long as nothing has."""

    def __init__(self, device: torch.device, batches: int, look_every: int) -> None:
        self.by: str | None = None
        self._device = device
        self._batches = batches  # of an epoch
        self._most = look_every  # batches between two questions
        self._ask_at = 0  # batch of the epoch after which the processes ask each other
        self._asked_at, self._trained_then = time.monotonic(), 0

    def told(self) -> bool:
        """True if this process was told to stop. Called between two steps of an evaluation, in
        which the model may hold an average: nothing is saved there."""
        self.by = self.by or stop.asked()
        return self.by is not None

    def agreed(self, done: int, trained: int) -> bool:
        """True if a process was told to stop; to be called by all after batch ``done`` of an epoch
        and ``trained`` batches in all. Several processes ask at the same batches."""
        told = self.told()
        if distributed.world_size() == 1:
            return told
        batches = self._batches
        if done < self._ask_at and done < batches:
            return False
        now = time.monotonic()
        took = (now - self._asked_at) / max(1, trained - self._trained_then)
        self._asked_at, self._trained_then = now, trained
        # All wait for the slowest one, and choose the same batch for the next question.
        anyone, slowest = distributed.most([float(told), took], self._device)
        self._ask_at = done + max(1, min(self._most, int(ASK_EVERY / max(slowest, 1e-9))))
        if self._ask_at > batches:
            self._ask_at = 0 if done == batches else batches
        if anyone and not told:
            self.by = "another process"
        return bool(anyone)

    def reason(self) -> str:
        """What has asked, in words."""
        self.by = self.by or stop.asked() or "another process"
        return self.by
