"""ATTA-K: attacks that continue from the end of the previous epoch's (Zheng et al., 2020)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Context, Setup
from fastadv.algorithms.sample_state import SampleStore, sample_count
from fastadv.declared import CountOrZero, Passes, option
from fastadv.engine import noise

INITIAL_STD = 0.001  # the published store begins at x + 0.001 N(0, I), not clipped to the box
PUBLISHED_ALPHA = {10: 0.007, 3: 0.01, 1: 0.015}  # from this many steps on, at eps = 0.031
PUBLISHED_EPS = 0.031


@dataclass(eq=False)
class ATTA(Ascent):
    """``steps`` steps from the adversarial image of the same sample in the previous epoch.

    The state is one perturbation per sample (x_adv - x) in the padded image. It is read and written
    back through the crop and flip that made x; pixels outside the window keep their values. Before
    every ``reset_every``-th epoch, counted from 1 as in the released code, the perturbations are
    drawn anew (0: never; otherwise the step must know the epoch). alpha is 0.015, 0.01, 0.007 of
    0.031 for 1, 3 and 10 steps, in units of eps. The attack runs with BatchNorm's running
    statistics. A given ``start`` replaces the stored perturbation.
    """

    attack_bn: Literal["train", "eval"] = option("eval", "mode of BatchNorm during the attack")
    steps: Passes = option(1, "steps of the attack")
    reset_every: CountOrZero = option(
        10, "epochs after which the stored perturbations start anew; 0: never"
    )
    pad: CountOrZero = option(4, "largest shift of the random crops in pixels, as the run's")

    store: SampleStore = field(init=False, repr=False)

    def sample_state(self) -> tuple[str, ...]:
        return ("perturbations",)

    @property
    def step_size(self) -> float:
        if self.alpha is not None:
            return self.alpha
        published = next(alpha for steps, alpha in PUBLISHED_ALPHA.items() if self.steps >= steps)
        return published / PUBLISHED_EPS * self.setup.threat.eps

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        count = sample_count(setup.num_samples, "ATTA")
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
        return self._due(epoch) != int(self.resets)

    def schedule(self, update: int, epoch: float) -> None:
        due = self._due(epoch)
        if due != int(self.resets):
            seed, ok = self.setup.seed, self.setup.sound()
            self.store.fill_normal(INITIAL_STD, seed, due, noise.STORE, ok)
            self.resets.fill_(due)

    def make(self, batch: Batch, context: Context) -> Adversarial:
        x_adv = self.given_start(batch, batch.x)
        if x_adv is None:
            size = (batch.x.shape[2], batch.x.shape[3])
            x_adv = batch.x + self.store.gather(batch.index, batch.view, size)
        start = x_adv
        for _ in range(self.steps):
            x_adv = self.net.run(self.ascend, x_adv, batch.x, batch.y, context)
        return Adversarial(x_adv, batch.x, context, start)

    @torch.no_grad()
    def after(
        self,
        batch: Batch,
        attacked: Adversarial,
        leaf_gradients: list[Tensor],
        input_gradient: Tensor | None,
        ok: Tensor,
    ) -> None:
        self.store.write(batch.index, batch.view, attacked.x_adv - batch.x, ok)
