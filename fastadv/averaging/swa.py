"""SWA: the running mean of the weights at the ends of epochs (Izmailov et al., 2018)."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastadv.contract import Averaging
from fastadv.declared import Count, NonNegative
from fastadv.errors import UserError


@dataclass(eq=False)
class SWA(Averaging):
    """average <- (n average + w)/(n + 1) at the end of every ``average_every``-th epoch.

    From epoch ``average_start`` (from 0; a number below 1 is a fraction of the run, which needs
    its length). Parameters only, BatchNorm affine included; its statistics must be re-estimated
    before the average is evaluated. Before the first average the live
    weights are evaluated. Training itself is not changed.
    """

    average_start: NonNegative = 0.5
    average_every: Count = 1

    mean: list[Tensor] = field(init=False, repr=False, default_factory=list)
    count: Tensor = field(init=False, repr=False)

    def first_epoch(self) -> int:
        """The epoch (from 0) whose end gives the first average."""
        if self.average_start >= 1 or self.average_start == 0:
            return int(self.average_start)
        total, length = self.setup.total_steps, self.setup.steps_per_epoch
        if total is None or length is None:
            raise UserError(
                "SWA starts after a fraction of the run: pass total_steps= and steps_per_epoch=, "
                "or average_start= as a number of epochs."
            )
        return int(self.average_start * (total / length))

    def start(self, parameters: list[Tensor]) -> None:
        self.first_epoch()
        self.mean = [parameter.detach().clone() for parameter in parameters]
        self.count = torch.zeros((), dtype=torch.int64)
        self.state = {f"average_{place}": tensor for place, tensor in enumerate(self.mean)}
        self.state["average_count"] = self.count

    @torch.no_grad()
    def epoch_end(self, epoch: int, parameters: list[Tensor]) -> None:
        first = self.first_epoch()
        if epoch < first or (epoch - first) % self.average_every:
            return
        self.count += 1
        torch._foreach_lerp_(self.mean, parameters, 1 / float(self.count))

    def average(self) -> list[Tensor] | None:
        return self.mean if self.count else None
