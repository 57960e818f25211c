"""EMA: an exponential moving average of the weights, updated after every optimizer step."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fastadv.algorithms.averaging.named import Named
from fastadv.algorithms.contract import Setup
from fastadv.declared import ShareBelowOne, option


class EMA(Named):
    """average <- d * average + (1 - d) * w after every update, d = ``average_decay``.

    At the beginning d is (1 + n)/(10 + n) while that is smaller, with n the updates so far, so that
    the average forgets its random start. Only parameters are averaged; BatchNorm's running
    statistics are the live ones, or re-estimated (``Step.evaluation_weights``).
    """

    average_decay: ShareBelowOne = option(0.995, "decay of the average of the weights per update")

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._weight = torch.zeros((), device=setup.device, dtype=setup.dtype)

    def schedule(self, update: int, epoch: float) -> None:
        self._weight.fill_(1 - min(self.average_decay, (1 + update) / (10 + update)))

    @torch.no_grad()
    def update(self, parameters: Mapping[str, Tensor], ok: Tensor, ended: int | None) -> None:
        if ended is not None:
            return
        weight = torch.where(ok, self._weight, torch.zeros_like(self._weight))
        self.move(parameters, weight, self.shadow)

    def averaged(self) -> dict[str, Tensor]:
        return self.shadow
