"""PGD-K: K projected gradient steps (Madry et al., 2018; the training attack of AT and TRADES)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from fastadv import kernels
from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Context, required
from fastadv.declared import Passes, option
from fastadv.engine import noise
from fastadv.errors import UserError


@dataclass(eq=False)
class PGD(Ascent):
    """``steps`` steps of ``alpha``; of several ``restarts`` the one with the largest loss is kept.

    alpha is eps/4 in Linf (2/255 at 8/255) and 15/128 eps in L2 (15/255 at 128/255), as in
    locuslab/robust_overfitting. The last iterate is returned. If a part needs
    ``correct_at_each_step``, the attack also counts, per sample, the steps before which the sample
    was classified right (GAIRAT's kappa). ``boxed_start=False`` starts as the memorization paper's
    TE does: in Linf the random start is not clipped to the box, in L2 it is x + 0.001 N(0,1).
    """

    steps: Passes = option(10, "steps of the attack")
    random_start: bool = option(True, "start at a random point of the ball")
    boxed_start: bool = option(True, "clip the random start to the range of images")
    restarts: Passes = option(
        1, "restarts of the attack, of which the one with the largest loss is kept"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.random_start and self.attack_objective == "kl":
            raise UserError(
                "random_start=False is for attack_objective='ce': at x' = x the KL has no gradient."
            )

    @property
    def step_size(self) -> float:
        return self.setup.threat.pgd_alpha if self.alpha is None else self.alpha

    def random_point(self, batch: Batch, restart: int = 0) -> Tensor:
        threat, stream = self.setup.threat, noise.START + restart
        if self.boxed_start or self.attack_objective == "kl":
            return super().random_point(batch, restart)
        if threat.norm == "l2":
            return self.near(batch, stream)
        # A box wide enough for the whole ball around any image.
        wide = replace(threat, low=threat.low - threat.eps, high=threat.high + threat.eps)
        return wide.start(batch.x, batch.index, self.setup.seed, batch.offset, stream)

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start, x_adv, correct = self._climb(batch, context, 0)
        for restart in range(1, self.restarts):
            began, other, also = self._climb(batch, context, restart)
            with self.net.keeping_buffers():
                worse = self.net.run(self._worse, x_adv, other, batch.y, context)
            x_adv = torch.where(worse.view(-1, 1, 1, 1), other, x_adv)
            start = torch.where(worse.view(-1, 1, 1, 1), began, start)
            if correct is not None and also is not None:
                correct = torch.where(worse, also, correct)
        return Adversarial(x_adv, batch.x, context._replace(correct_steps=correct), start)

    def _climb(
        self, batch: Batch, context: Context, restart: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The start and the end (B,C,H,W) of one restart, and before how many steps each sample was
        classified right (B,), or None if no part needs it."""
        start = self.given_start(batch, batch.x) if restart == 0 else None
        if start is not None:
            x_adv = start
        else:
            # detach: a compiled step must not see x_adv and x as one object in the first iteration
            random = self.random_start or restart
            x_adv = self.random_point(batch, restart) if random else batch.x.detach()
        start = x_adv
        if "correct_at_each_step" not in self.setup.needs:
            for _ in range(self.steps):
                x_adv = self.net.run(self.ascend, x_adv, batch.x, batch.y, context)
            return start, x_adv, None
        correct = torch.zeros_like(batch.y)
        for _ in range(self.steps):
            x_adv, correct = self.net.run(
                self._ascend_and_count, x_adv, batch.x, batch.y, context, correct
            )
        return start, x_adv, correct

    def _ascend_and_count(
        self,
        x_adv: Tensor,
        around: Tensor,
        y: Tensor,
        context: Context,
        correct: Tensor,
    ) -> tuple[Tensor, Tensor]:
        moved, logits = self.ascend_with_logits(x_adv, around, y, context)
        return moved, correct + (logits.argmax(1) == y)

    def _worse(self, first: Tensor, second: Tensor, y: Tensor, context: Context) -> Tensor:
        """True for each sample (B,) whose attacked loss is larger at ``second``."""
        with torch.no_grad():
            logits = [self.net.logits(x) for x in (first, second)]
        if self.attack_objective == "kl":
            natural = required(context.natural_logits_attack)
            losses = [kernels.trades_kl(natural, found) for found in logits]
        else:
            losses = [functional.cross_entropy(found, y, reduction="none") for found in logits]
        first_loss, second_loss = losses
        # A restart that ended in NaN is kept, so that the fault is seen.
        lost = second_loss.isnan() & ~first_loss.isnan()
        return (second_loss > first_loss) | lost
