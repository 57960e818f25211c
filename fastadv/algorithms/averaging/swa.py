"""SWA: the running mean of the weights at the ends of epochs (Izmailov et al., 2018)."""

from collections.abc import Mapping
from dataclasses import field

import torch
from torch import Tensor

from fastadv.algorithms.averaging.named import Named
from fastadv.algorithms.phases import epoch_of
from fastadv.declared import Count, NonNegative, option

MISSED = "average_missed."


class SWA(Named):
    """average <- (n average + w)/(n + 1) at the end of every ``average_every``-th epoch.

    Averaging begins with epoch ``average_start`` (from 0; a number below 1 is a fraction of the
    run, whose length must then be known). Only parameters are averaged, BatchNorm's affine ones
    included; its statistics must be re-estimated before the average is evaluated. There all batches
    count alike (``torch.optim.swa_utils.update_bn``); the published code gives a batch of b images
    b/(n + b), which differs for a last batch that is shorter. Before the first
    average the live weights are evaluated. A parameter that is added to the model later is averaged
    from then on. Training does not change.
    """

    average_start: NonNegative = option(
        0.5, "epoch, counted from 0, at which averaging begins; below 1: share of the run"
    )
    average_every: Count = option(1, "epochs from one averaging to the next")

    count: Tensor = field(init=False, repr=False)

    def first_epoch(self) -> int:
        """The epoch (from 0) at whose end the first average is taken. Raises ``UserError`` for a
        fraction of a run of unknown length."""
        return int(epoch_of(self.average_start, self.setup, "average_start"))

    def start(self, tensors: Mapping[str, Tensor]) -> None:
        self.first_epoch()
        # On the device, since only there is it known if an average was taken.
        self.count = torch.zeros((), dtype=torch.int64, device=self.setup.device)
        self.state = {"average_count": self.count}
        super().start(tensors)

    def replaced(self, tensors: Mapping[str, Tensor], old: Mapping[str, str]) -> None:
        known, missed = set(self.shadow), {name: self._missed(name) for name in self.shadow}
        super().replaced(tensors, old)
        self._drop_missed()
        for name in self.shadow:
            before = old.get(name)
            self._miss(name, missed[before] if before in known else int(self.count))

    def _missed(self, name: str) -> int:
        """The number of averages that were taken before ``name`` was in the model."""
        return int(self.state.get(MISSED + name, 0))

    def _miss(self, name: str, count: int) -> None:
        if count:
            self.state[MISSED + name] = torch.tensor(count)

    def _drop_missed(self) -> None:
        self.state = {k: tensor for k, tensor in self.state.items() if not k.startswith(MISSED)}

    def load_state(self, saved: Mapping[str, Tensor]) -> None:
        self._drop_missed()
        for name in self.shadow:
            self._miss(name, int(saved.get(MISSED + name, 0)))
        super().load_state(saved)

    @torch.no_grad()
    def update(self, tensors: Mapping[str, Tensor], ok: Tensor, ended: int | None) -> None:
        first = self.first_epoch()
        if ended is None or ended < first or (ended - first) % self.average_every:
            return
        self.count += ok
        missed = {name: self._missed(name) for name in self.shadow}
        for many in set(missed.values()):
            names = [name for name in missed if missed[name] == many]
            # If not ok, the count may still be 0, and 0/0 is not a weight.
            taken = (self.count - many).clamp(min=1)
            self.move(tensors, ok.to(torch.float64) / taken, names)

    def averaged(self) -> dict[str, Tensor]:
        count = int(self.count)
        return {name: t for name, t in self.shadow.items() if count > self._missed(name)}
