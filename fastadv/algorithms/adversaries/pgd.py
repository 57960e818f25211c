"""PGD-K: K projected gradient steps (Madry et al., 2018; the training attack of AT and TRADES)."""

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastadv import ranges
from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import (
    FORWARD,
    INPUT_GRADIENT,
    Adversarial,
    Batch,
    Capabilities,
    Conflict,
    Context,
    Pass,
)
from fastadv.by_epoch import Phases
from fastadv.declared import ChangingPasses, Restarts, option
from fastadv.threat import Threat


class PGD(Ascent):
    """``steps`` steps of ``alpha``; of several ``restarts`` the one with the largest loss is kept.

    alpha is eps/4 in Linf (2/255 at 8/255) and 15/128 eps in L2 (15/255 at 128/255), as in
    locuslab/robust_overfitting, where a step in L2 is projected to the ball and then to the box.
    With ``l2_form`` "trades" alpha is 2 eps/``steps`` in L2, and a step is projected to the box and
    then to the ball (yaodongyu/TRADES). There an image whose gradient is zero moves in a random
    direction; here it stays, as in every attack of this package. With an ``alpha`` of one's own its
    steps are those of advertorch, with which Chen et al. (2021) and Tack et al. (2022) attack in
    L2, from other starts. In Linf the two forms are one.

    The start is a random point of the ball, for an attack on the KL
    x + 0.001 N(0,1) (TRADES). The last iterate is returned. If a part needs
    ``correct_at_each_step``, the attack also counts, per sample, the steps before which the sample
    was classified right (GAIRAT's kappa).
    """

    counts_correct: ClassVar[bool] = True

    steps: ChangingPasses = option(10, "steps of the attack; phases such as 2@0,5@30 by epoch")
    l2_form: Literal["robust-overfitting", "trades"] = option(
        "robust-overfitting", "step size and order of the projections in L2"
    )
    restarts: Restarts = option(
        1, "restarts of the attack, of which the one with the largest loss is kept"
    )

    _now: int | None = field(init=False, repr=False, default=None)  # the steps of this epoch

    @property
    def gradient_steps(self) -> int:
        """The steps of the present epoch; before the first update the most of any epoch."""
        if not isinstance(self.steps, Phases):
            return self.steps
        return int(max(self.steps.values())) if self._now is None else self._now

    def follows_epochs(self) -> bool:
        return super().follows_epochs() or isinstance(self.steps, Phases)

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        if isinstance(self.steps, Phases):
            self._now = int(self.steps.at(epoch))

    def phase(self) -> Hashable:
        return super().phase(), self._now

    def usual_step(self, threat: Threat) -> float | Tensor:
        if threat.norm == "l2" and self.l2_form == "trades":
            return threat.of_eps(2 / max(self.gradient_steps, 1))
        return threat.pgd_alpha

    def moved(self, x_adv: Tensor, gradient: Tensor, around: Tensor, batch: Batch) -> Tensor:
        threat = batch.threat
        if threat.norm != "l2" or self.l2_form != "trades":
            return threat.step(x_adv, gradient, around, self.step_size(batch))
        boxed = threat.unbounded().step(x_adv, gradient, around, self.step_size(batch))
        return threat.project(boxed, around)  # into the ball; the box then changes nothing

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        yield from super().conflicts(method)
        if self.restarts > 1 and not method.attack_loss_per_sample:
            yield Conflict("attack_loss", "restarts compare the loss of each sample.")

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        once = Counter({Pass(INPUT_GRADIENT, self.attack_bn): self.gradient_steps * self.restarts})
        # A restart compares the losses of two points.
        once[Pass(FORWARD, self.attack_bn)] = 2 * (self.restarts - 1)
        return once

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start, x_adv, correct = self._climb(batch, context, 0)
        for restart in range(1, self.restarts):
            began, other, also = self._climb(batch, context, restart)
            with self.net.keeping_buffers():
                worse = self.net.run(self._worse, x_adv, other, batch.attacked_y, context)
            x_adv = torch.where(worse.view(-1, 1, 1, 1), other, x_adv)
            start = torch.where(worse.view(-1, 1, 1, 1), began, start)
            if correct is not None and also is not None:
                correct = torch.where(worse, also, correct)
        return Adversarial(x_adv, batch.x, context._replace(correct_share=correct), start)

    def _climb(
        self, batch: Batch, context: Context, restart: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The start and the end (B,C,H,W) of one restart, and the share (B,) of the steps before
        which each sample was classified right, or None if no part needs it."""
        x_adv = start = self.begin(batch, restart)
        if "correct_at_each_step" not in self.setup.method.needs:
            for _ in range(self.gradient_steps):
                x_adv = self.net.run(self.ascend, x_adv, batch.x, batch, context)
            return start, x_adv, None
        correct = torch.zeros(len(batch.y), dtype=torch.int64, device=batch.y.device)
        for _ in range(self.gradient_steps):
            x_adv, correct = self.net.run(
                self._ascend_and_count, x_adv, batch.x, batch, context, correct
            )
        return start, x_adv, correct / self.gradient_steps

    def _ascend_and_count(
        self, x_adv: Tensor, around: Tensor, batch: Batch, context: Context, correct: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient, logits = self.gradient_at(x_adv, batch, context)
        moved = self.moved(x_adv.detach(), gradient, around, batch)
        return moved, correct + (logits.argmax(1) == ranges.hard(batch.y))

    def _worse(self, first: Tensor, second: Tensor, y: Tensor, context: Context) -> Tensor:
        """True for each sample (B,) whose attacked loss is larger at ``second``."""
        with torch.no_grad():
            logits = [self.net.logits(x) for x in (first, second)]
        loss = self.setup.attack_loss.per_sample
        first_loss, second_loss = (loss(found, y, context) for found in logits)
        # A restart that ended in NaN is kept, so that the fault is seen.
        lost = second_loss.isnan() & ~first_loss.isnan()
        return (second_loss > first_loss) | lost
