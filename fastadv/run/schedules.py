"""Learning-rate schedules: a factor of the peak rate for every update."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

STEPPED = ("piecewise", "multistep")
PEAKS: Mapping[str, float] = {"triangular": 0.5, "one-cycle": 0.3}
"""Schedules that rise to a peak and fall -> the usual share of the run before it (the second is
that of torch's ``OneCycleLR``)."""
CYCLED_MOMENTUM = 0.1  # how far CyclicLR and OneCycleLR lower the momentum at the peak
USUAL_DROPS = (0.5, 0.75)  # epochs 100 and 150 of 200 (Rice et al. 2020)
ROUNDING = 1e-6  # of an update: 0.7 * 10 is not 7 in floating point
BEGIN, END = 1 / 25, 1 / 25e4  # the first and the last rate of OneCycleLR with its defaults


def factor(
    schedule: str,
    update: int,
    total: int,
    drops: Sequence[float] = USUAL_DROPS,
    *,
    drop_factors: Sequence[float] | None = None,
    peak: float | None = None,
    epochs: int = 1,
) -> float:
    """The learning rate of update number ``update`` (from 0) of ``total``, in units of its peak.

    ``triangular`` rises linearly from 0 to 1, reached at the share ``peak`` of the run, and falls
    back (Wong et al. 2020; GradAlign: 0.4, there one update ahead). ``piecewise`` and
    ``multistep`` fall at each of ``drops``, fractions of the run, tenfold or by the corresponding
    one of ``drop_factors``: the one already on the update that completes the epoch (Rice et al.
    2020), the other on the first update after it (who sets the rate once an epoch, as TRADES and
    ``MultiStepLR`` do). ``cosine``; ``cosine-epoch``, set once in each of ``epochs`` (RST);
    ``one-cycle``, torch's ``OneCycleLR`` stepped once an epoch (FastAT_Benchmark); ``constant``.
    """
    if schedule in STEPPED:
        done = update + (schedule == "piecewise")
        passed = [done >= drop * total - ROUNDING for drop in drops]
        if drop_factors is None:
            return 10.0 ** -sum(passed)
        return math.prod(f for f, over in zip(drop_factors, passed, strict=True) if over)
    epoch = update * epochs // total
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * update / total))
    if schedule == "cosine-epoch":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule == "one-cycle":
        rising, height = _one_cycle(epoch, epochs, peak)
        least = BEGIN if rising else END
        return least + (1 - least) * height
    return height_of(schedule, update, total, peak=peak, epochs=epochs)


def height_of(
    schedule: str, update: int, total: int, *, peak: float | None = None, epochs: int = 1
) -> float:
    """How high a schedule of ``PEAKS`` is at an update, from 0 to 1 at its peak; 1 for others."""
    if schedule == "one-cycle":
        return _one_cycle(update * epochs // total, epochs, peak)[1]
    if schedule != "triangular":
        return 1.0
    at = PEAKS[schedule] if peak is None else peak
    share = update / total
    below = (at - share) / at if share < at else (share - at) / (1 - at)
    return max(0.0, 1 - below)


def _one_cycle(epoch: int, epochs: int, peak: float | None) -> tuple[bool, float]:
    """True while the rate rises, and its height: half a cosine up, half a cosine down."""
    top = (PEAKS["one-cycle"] if peak is None else peak) * epochs - 1
    if epoch <= top:
        done = epoch / top if top else 1.0  # a peak at the first epoch, where torch divides by 0
        return True, 0.5 * (1 - math.cos(math.pi * done))
    done = (epoch - top) / (epochs - 1 - top)
    return False, 0.5 * (1 + math.cos(math.pi * done))


class Schedule:
    """Sets the learning rate (and, for a cycle, the momentum) before each update.

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
        drop_factors: Sequence[float] | None = None,
        peak: float | None = None,
        epochs: int = 1,
    ) -> None:
        self.optimizer, self.kind, self.total = optimizer, kind, total
        self.drops, self.drop_factors = drops, drop_factors
        self.peak, self.epochs = peak, epochs
        self.cycle_momentum = cycle_momentum and kind in PEAKS
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.momenta = [group.get("momentum") for group in optimizer.param_groups]

    def __call__(self, update: int) -> None:
        """Make the optimizer ready for update number ``update`` (from 0)."""
        when: dict[str, Any] = {"peak": self.peak, "epochs": self.epochs}
        now = factor(
            self.kind, update, self.total, self.drops, drop_factors=self.drop_factors, **when
        )
        height = height_of(self.kind, update, self.total, **when)
        groups = zip(self.optimizer.param_groups, self.peaks, self.momenta, strict=True)
        for group, peak, momentum in groups:
            if group.get("fixed_rate") is not None:
                continue
            group["lr"] = peak * now
            if self.cycle_momentum and momentum:
                group["momentum"] = momentum - CYCLED_MOMENTUM * height
