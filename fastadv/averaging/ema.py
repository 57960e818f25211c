"""EMA: an exponential moving average of the weights, one update a step."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastadv.contract import Averaging, Setup
from fastadv.declared import ShareBelowOne


@dataclass(eq=False)
class EMA(Averaging):
    """average <- d * average + (1 - d) * w after every update, d = ``average_decay``.

    Early on d is (1 + n)/(10 + n) where that is smaller, n the updates so far, so that the
    average forgets its random start. Parameters only; BatchNorm's running statistics are the
    live ones, or re-estimated (``Step.evaluation_weights``).
    """

    average_decay: ShareBelowOne = 0.995

    shadow: list[Tensor] = field(init=False, repr=False, default_factory=list)

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._weight = torch.zeros((), device=setup.device, dtype=setup.dtype)

    def start(self, parameters: list[Tensor]) -> None:
        self.shadow = [parameter.detach().clone() for parameter in parameters]
        self.state = {f"average_{place}": tensor for place, tensor in enumerate(self.shadow)}

    def schedule(self, update: int, epoch: float) -> None:
        self._weight.fill_(1 - min(self.average_decay, (1 + update) / (10 + update)))

    @torch.no_grad()
    def update(self, parameters: list[Tensor], ok: Tensor) -> None:
        weight = torch.where(ok, self._weight, torch.zeros_like(self._weight))
        torch._foreach_lerp_(self.shadow, parameters, [weight] * len(parameters))

    def average(self) -> list[Tensor] | None:
        return self.shadow
