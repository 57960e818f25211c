"""What the attack of a plan maximises."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastadv import kernels
from fastadv.algorithms.contract import Context, required
from fastadv.algorithms.plan import Plan
from fastadv.engine.model.network import Network


class PlanAttackLoss:
    """The ``attack_loss`` of ``Setup``: the adversary's objective, cross-entropy or the KL to the
    natural prediction, plus the target's term, if it has one."""

    def __init__(self, plan: Plan, net: Network) -> None:
        self.plan, self.net = plan, net

    def __call__(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The mean over the batch, times the loss scale (0-dim)."""
        loss = self._losses(logits, y, context, "mean")
        if loss.dim():
            loss = loss.mean()
        scale = self.net.loss_scale(len(y))
        return loss if scale == 1.0 else loss * scale

    def per_sample(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The loss of each sample (B,), without the loss scale."""
        return self._losses(logits, y, context, "none")

    def _losses(self, logits: Tensor, y: Tensor, context: Context, reduction: str) -> Tensor:
        """(B,), or 0-dim if ``reduction`` is "mean" and the loss is the plain cross-entropy."""
        if self.plan.target.labels == "any":
            return self.plan.target.fit(logits, y, context)
        term = self.plan.target.attack_term(logits, context)
        if self.plan.adversary.attack_objective == "kl":
            losses = kernels.trades_kl(required(context.natural_logits_attack), logits)
            return losses if term is None else self.plan.objective.attack_scale() * losses + term
        if term is None:
            return functional.cross_entropy(logits, y, reduction=reduction)
        return functional.cross_entropy(logits, y, reduction="none") + term
