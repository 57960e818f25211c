"""Learning-rate schedules: a factor of the peak rate for every update."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from fastadv.by_epoch import Points
from fastadv.errors import UserError
from fastadv.run.own_schedule import OwnSchedule

STEPPED = ("piecewise", "multistep")
ENDS: Mapping[str, float] = {"cosine": 0.0, "linear": 0.0, "exponential": 0.01}
"""Schedules that fall to a share of their peak -> the usual one."""
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
    end: float | None = None,
    points: Points | None = None,
    warmup: float | None = None,
    own: OwnSchedule | None = None,
) -> float:
    """The learning rate of update number ``update`` (from 0) of ``total``, in units of its peak:
    that of the schedule, times a warm-up that rises linearly over the first ``warmup`` of
    ``epochs`` epochs. Of a warm-up of n updates the first has 1/n of the schedule's rate and the
    n-th all of it; the schedule itself is not moved. ``own``: in place of ``schedule``.
    """
    shares: dict[str, Any] = {"drop_factors": drop_factors, "peak": peak, "epochs": epochs}
    if own is not None:
        now = own(update * epochs / total)
    else:
        now = _scheduled(schedule, update, total, drops, end=end, points=points, **shares)
    if warmup is None:
        return now
    return now * min(1.0, (update + 1) / (warmup * total / epochs))


def _scheduled(
    schedule: str,
    update: int,
    total: int,
    drops: Sequence[float],
    *,
    drop_factors: Sequence[float] | None,
    peak: float | None,
    epochs: int,
    end: float | None,
    points: Points | None,
) -> float:
    """The learning rate of update number ``update`` (from 0) of ``total``, in units of its peak.

    ``triangular`` rises linearly from 0 to 1, reached at the share ``peak`` of the run, and falls
    back (Wong et al. 2020; GradAlign: 0.4, there one update ahead). ``piecewise`` and
    ``multistep`` fall at each of ``drops``, fractions of the run, tenfold or by the corresponding
    one of ``drop_factors``: the one already on the update that completes the epoch (Rice et al.
    2020), the other on the first update after it (who sets the rate once an epoch, as TRADES and
    ``MultiStepLR`` do). ``cosine``, ``linear`` and ``exponential`` fall from 1 to ``end`` (None:
    that of ``ENDS``), which the update after the last would have; ``cosine-epoch``, set once in
    each of ``epochs`` (RST); ``points``: straight lines between the rates of ``points``, by the
    epoch, in units of the largest; ``one-cycle``, torch's ``OneCycleLR`` stepped once an epoch
    (FastAT_Benchmark); ``constant``.
    """
    if schedule in ENDS:
        least, share = ENDS[schedule] if end is None else end, update / total
        if schedule == "exponential":
            return math.pow(least, share)
        falls = 1 - share if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        return least + (1 - least) * falls
    if schedule == "points":
        assert points is not None  # ``check`` has required them
        return points.at(update * epochs / total) / max(points.values())
    if schedule in STEPPED:
        done = update + (schedule == "piecewise")
        passed = [done >= drop * total - ROUNDING for drop in drops]
        if drop_factors is None:
            return 10.0 ** -sum(passed)
        return math.prod(f for f, over in zip(drop_factors, passed, strict=True) if over)
    epoch = update * epochs // total
    if schedule == "cosine-epoch":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    if schedule == "one-cycle":
        rising, height = _one_cycle(epoch, epochs, peak)
        least = BEGIN if rising else END
        return least + (1 - least) * height
    return height_of(schedule, update, total, peak=peak, epochs=epochs)


def require_schedule(
    schedule: str,
    points: Points | None,
    end: float | None,
    warmup: float | None,
    epochs: int,
) -> None:
    """Raise ``UserError`` for settings of a schedule that it has not, lacks, or cannot follow."""
    if (points is not None) != (schedule == "points"):
        raise UserError(
            "--schedule points needs the rates by epoch: --points 0@0,0.1@5,0@30."
            if points is None
            else f"--points is for --schedule points; omit it with {schedule}."
        )
    if points is not None and not (min(points.values()) >= 0 < max(points.values())):
        raise UserError("The rates of --points are at least 0, and one of them is above 0.")
    if end is not None and schedule not in ENDS:
        raise UserError(f"--end-factor is for --schedule {_listed(ENDS)}; omit it with {schedule}.")
    if schedule == "exponential" and end == 0:
        raise UserError("--end-factor must be above 0 with an exponential schedule, such as 0.01.")
    if warmup is not None and schedule in PEAKS:
        raise UserError(
            f"A {schedule} schedule rises by itself; omit --warmup, or move its --peak."
        )
    if warmup is not None and warmup > epochs:
        raise UserError(f"--warmup takes {warmup:g} epochs, and the run has {epochs}.")


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"


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
        end: float | None = None,
        points: Points | None = None,
        warmup: float | None = None,
        own: OwnSchedule | None = None,
    ) -> None:
        self.optimizer, self.kind, self.total = optimizer, kind, total
        self.drops, self.drop_factors = drops, drop_factors
        self.peak, self.epochs = peak, epochs
        self._falls: dict[str, Any] = {"end": end, "points": points, "warmup": warmup, "own": own}
        self.cycle_momentum = cycle_momentum and kind in PEAKS
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.momenta = [group.get("momentum") for group in optimizer.param_groups]

    def __call__(self, update: int) -> None:
        """Make the optimizer ready for update number ``update`` (from 0)."""
        when: dict[str, Any] = {"peak": self.peak, "epochs": self.epochs}
        falls = {"drop_factors": self.drop_factors, **self._falls, **when}
        now = factor(self.kind, update, self.total, self.drops, **falls)
        height = height_of(self.kind, update, self.total, **when)
        groups = zip(self.optimizer.param_groups, self.peaks, self.momenta, strict=True)
        for group, peak, momentum in groups:
            if group.get("fixed_rate") is not None:
                continue
            group["lr"] = peak * now
            if self.cycle_momentum and momentum:
                group["momentum"] = momentum - CYCLED_MOMENTUM * height
