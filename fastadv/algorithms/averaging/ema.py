"""EMA: an exponential moving average of the weights, updated after every optimizer step."""

from collections.abc import Mapping
from dataclasses import field
from typing import Literal

import torch
from torch import Tensor

from fastadv.algorithms.averaging.named import Named
from fastadv.algorithms.contract import Setup
from fastadv.algorithms.phases import epoch_of
from fastadv.declared import NonNegative, ShareBelowOne, option


class EMA(Named):
    """average <- d * average + (1 - d) * w after every update, d = ``average_decay``.

    With ``average_warmup`` d is (1 + n)/(10 + n) while that is smaller, with n the updates so far,
    so that the average forgets its random start. Without it the average begins as the weights
    after the first update, and d never changes (fzjcdt/FastAT_Benchmark). With ``average_at``
    "epoch" all this happens at the end of every epoch in place of every update, n counting epochs.

    Before epoch ``average_start`` (from 0; a number below 1 is a fraction of the run) the average
    is the live weights, and without a warm-up it begins as the weights after the first update from
    then on.

    With ``average_buffers`` BatchNorm's running statistics, and all other floating-point buffers of
    the model's state, are averaged and evaluated like weights. Otherwise the statistics are the
    live ones, or re-estimated (``Step.evaluation_weights``).
    """

    average_decay: ShareBelowOne = option(0.995, "decay of the average of the weights per update")
    average_start: NonNegative = option(
        0.0, "epoch, counted from 0, at which averaging begins; below 1: share of the run"
    )
    average_at: Literal["update", "epoch"] = option(
        "update", "average after every update, or at the end of every epoch"
    )
    average_warmup: bool = option(True, "begin the average with a smaller decay, which rises")
    average_buffers: bool = option(
        False, "average BatchNorm's running statistics also, in place of estimating them again"
    )

    begun: Tensor = field(init=False, repr=False)

    @property
    def averages_buffers(self) -> bool:
        return self.average_buffers

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._weight = torch.zeros((), device=setup.device, dtype=setup.dtype)
        self._started = torch.zeros((), device=setup.device, dtype=torch.bool)
        self._start = epoch_of(self.average_start, setup, "average_start")

    def start(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.average_warmup:
            # On the device, since only there is it known if an update counted.
            self.begun = torch.zeros((), dtype=torch.bool, device=self.setup.device)
            self.state = {"average_begun": self.begun}
        super().start(tensors)

    def follows_epochs(self) -> bool:
        return self.average_at == "epoch" or self.average_start > 0

    def schedule(self, update: int, epoch: float) -> None:
        done = update if self.average_at == "update" else int(epoch)
        rising = (1 + done) / (10 + done) if self.average_warmup else 1.0
        started = int(epoch) >= self._start
        self._started.fill_(started)
        self._weight.fill_(1 - min(self.average_decay, rising) if started else 1.0)

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], ok: Tensor, ended: int | None) -> None:
        if (ended is None) == (self.average_at == "epoch"):
            return
        weight = self._weight
        if not self.average_warmup:
            weight = torch.where(self.begun, weight, torch.ones_like(weight))
            self.begun.logical_or_(ok & self._started)
        self.move(tensors, torch.where(ok, weight, torch.zeros_like(weight)), self.shadow)

    def averaged(self) -> dict[str, Tensor]:
        return self.shadow
