"""The end of the attack on the same sample in the previous epoch (ATTA: Zheng et al., 2020)."""

from __future__ import annotations

from dataclasses import field

import torch
from torch import Tensor

from fastadv.algorithms.contract import Batch, Outcome, Setup
from fastadv.algorithms.sample_state import SampleStore, sample_count
from fastadv.algorithms.start_points import in_ball
from fastadv.algorithms.starts.begun import Begun
from fastadv.declared import CountOrZero, option
from fastadv.engine import noise

INITIAL_STD = 0.001  # the published store begins at x + 0.001 N(0, I), not clipped to the box


class Stored(Begun):
    """x0 = x + w_i, w_i the perturbation x_adv - x at which the last attack on sample i ended.

    The state is one perturbation per sample in the padded image. It is read and written back
    through the crop and flip that made x; pixels outside the window keep their values. Before every
    ``reset_every``-th epoch, counted from 1 as in the released code, the perturbations are drawn
    anew (0: never; otherwise the step must know the epoch). A start that the caller gives replaces
    the stored perturbation. A further restart begins at a random point of the ball.
    """

    reset_every: CountOrZero = option(
        10, "epochs after which the stored perturbations start anew; 0: never"
    )
    pad: CountOrZero = option(4, "largest shift of the random crops in pixels, as the run's")

    store: SampleStore = field(init=False, repr=False)

    def sample_state(self) -> tuple[str, ...]:
        return ("perturbations",)

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        count = sample_count(setup.num_samples, "A stored start")
        self.store = SampleStore.zeros(
            count, setup.image_shape, self.pad, setup.device, setup.dtype
        )
        self.store.fill_normal(INITIAL_STD, setup.seed, 0, noise.STORE)
        # On the CPU, where reading it stalls no device.
        self.resets = torch.zeros((), dtype=torch.int64)
        self.state = {"perturbations": self.store.values, "resets": self.resets}

    def check_images(self, batch: Batch) -> None:
        self.store.check_images(batch.x.shape, batch.view)

    def follows_epochs(self) -> bool:
        return self.reset_every > 0

    def _due(self, epoch: float) -> int:
        return (int(epoch) + 1) // self.reset_every if self.reset_every else 0

    def renews(self, epoch: float) -> bool:
        """True if ``schedule`` would overwrite all perturbations at ``epoch``."""
        return self._due(epoch) != int(self.resets)

    def schedule(self, update: int, epoch: float) -> None:
        due = self._due(epoch)
        if due != int(self.resets):
            seed, ok = self.setup.seed, self.setup.sound()
            self.store.fill_normal(INITIAL_STD, seed, due, noise.STORE, ok)
            self.resets.fill_(due)

    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        if restart:
            return in_ball(batch, self.setup, restart)
        size = (batch.x.shape[2], batch.x.shape[3])
        stored = self.store.gather(batch.index, batch.view, size)
        return batch.x + batch.threat.movable(stored)

    @torch.no_grad()
    def after(self, outcome: Outcome, ok: Tensor) -> None:
        batch = outcome.batch
        self.store.write(batch.index, batch.view, outcome.attacked.x_adv - batch.x, ok)
