"""Learning-rate schedules: a factor of the peak rate for every update."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

STEPPED = ("piecewise", "multistep")
TRIANGULAR_MOMENTUM = 0.1  # how far CyclicLR, with its defaults, lowers momentum at the peak
USUAL_DROPS = (0.5, 0.75)  # epochs 100 and 150 of 200 (Rice et al. 2020)
ROUNDING = 1e-6  # of an update: 0.7 * 10 is not 7 in floating point


def factor(schedule: str, update: int, total: int, drops: Sequence[float] = USUAL_DROPS) -> float:
    """The learning rate of update number ``update`` (from 0) of ``total``, in units of its peak.

    ``triangular`` rises from 0 to 1 and back (Wong et al. 2020). ``piecewise`` and ``multistep``
    fall tenfold at each of ``drops``, fractions of the run: the one already on the update that
    completes the epoch (Rice et al. 2020), the other on the first update after it (who sets the
    rate once an epoch, as TRADES and ``MultiStepLR`` do). ``cosine``; ``constant``.
    """
    if schedule == "triangular":
        return max(0.0, 1 - abs(2 * update / total - 1))
    if schedule in STEPPED:
        done = update + (schedule == "piecewise")
        return 10.0 ** -sum(done >= drop * total - ROUNDING for drop in drops)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * update / total))
    return 1.0


class Schedule:
    """Sets the learning rate (and, for a triangular cycle, the momentum) before each update.

    A parameter group with a ``fixed_rate`` keeps it (layers that learn at a fixed rate).
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        kind: str,
        total: int,
        *,
        cycle_momentum: bool,
        drops: Sequence[float] = USUAL_DROPS,
    ) -> None:
        self.optimizer, self.kind, self.total = optimizer, kind, total
        self.drops = drops
        self.cycle_momentum = cycle_momentum and kind == "triangular"
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.momenta = [group.get("momentum") for group in optimizer.param_groups]

    def __call__(self, update: int) -> None:
        """Make the optimizer ready for update number ``update`` (from 0)."""
        now = factor(self.kind, update, self.total, self.drops)
        groups = zip(self.optimizer.param_groups, self.peaks, self.momenta, strict=True)
        for group, peak, momentum in groups:
            if group.get("fixed_rate") is not None:
                continue
            group["lr"] = peak * now
            if self.cycle_momentum and momentum:
                group["momentum"] = momentum - TRIANGULAR_MOMENTUM * now
