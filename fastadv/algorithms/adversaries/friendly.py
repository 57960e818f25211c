"""FAT: PGD that stops soon after an image is misclassified (Zhang et al., ICML 2020)."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from fastadv import ranges
from fastadv.algorithms.adversaries.pgd import PGD
from fastadv.algorithms.contract import Adversarial, Batch, Context, Setup
from fastadv.by_epoch import Phases
from fastadv.declared import MayChange, NonNegative, Range, option
from fastadv.engine.noise import RESTART, noise_stream

NOISE = noise_stream("friendly.noise")

ChangingCount = Annotated[int | Phases, Range(0), MayChange(ramps=False)]


class Friendly(PGD):
    """PGD whose steps of an image end once it was misclassified before ``tau`` + 1 of them.

    Every step adds ``step_noise`` N(0,1) before the projection (omega in
    zjfheart/Friendly-Adversarial-Training, earlystop.py). There an image that has ended is taken
    out of the batch; here it stays where it is and is forwarded with the others. If a part needs
    ``correct_at_each_step``, the steps after an image's end count like those before.
    """

    tau: ChangingCount = option(
        0, "steps that an image takes after its first misclassification; phases such as 0@0,1@50"
    )
    step_noise: NonNegative = option(0.001, "noise that every step adds, in pixels")

    def follows_epochs(self) -> bool:
        return super().follows_epochs() or isinstance(self.tau, Phases)

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._left = torch.zeros((), device=setup.device, dtype=torch.int64)

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        self._left.fill_(int(self.tau.at(epoch)) if isinstance(self.tau, Phases) else self.tau)

    def unmoved(self, batch: Batch, attacked: Adversarial) -> Tensor | None:
        return None  # an image that is misclassified at its start stays there

    def _climb(
        self, batch: Batch, context: Context, restart: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x_adv = start = self.begin(batch, restart)
        again = batch._replace(offset=batch.offset + restart * RESTART) if restart else batch
        noise = self.normal(again, NOISE, (self.gradient_steps, *batch.x.shape[1:]))
        left = self._left.expand(len(batch.x)).clone()
        done = torch.zeros_like(left, dtype=torch.bool)
        correct = torch.zeros_like(left)
        for step in range(self.gradient_steps):
            x_adv, left, done, correct = self.net.run(
                self._ascend_unless_done,
                x_adv, left, done, correct, noise[:, step] * self.step_noise, batch, context,
            )  # fmt: skip
        counted = "correct_at_each_step" in self.setup.method.needs
        return start, x_adv, correct / self.gradient_steps if counted else None

    def _ascend_unless_done(
        self,
        x_adv: Tensor,
        left: Tensor,
        done: Tensor,
        correct: Tensor,
        noise: Tensor,
        batch: Batch,
        context: Context,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step of the images that are not done; a region."""
        gradient, logits = self.gradient_at(x_adv, batch, context)
        wrong = logits.argmax(1) != ranges.hard(batch.y)  # of a soft label, its largest entry
        done = done | (wrong & (left == 0))
        left = left - (wrong & ~done).to(left.dtype)
        x_adv = x_adv.detach()
        noisy = x_adv + batch.threat.movable(noise)
        moved = self.moved(noisy, gradient, batch.x, batch)
        return torch.where(done[:, None, None, None], x_adv, moved), left, done, correct + ~wrong
