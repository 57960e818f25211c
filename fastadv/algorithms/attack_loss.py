"""What the attack of a plan maximises: the loss of its part, plus the target's penalty."""

from __future__ import annotations

from torch import Tensor

from fastadv.algorithms.contract import Context, WeighsKL
from fastadv.algorithms.plan import Plan
from fastadv.engine.model.network import Network


class PlanAttackLoss:
    """The ``attack_loss`` of ``Setup``."""

    def __init__(self, plan: Plan, net: Network, *, targeted: bool) -> None:
        self.plan, self.net = plan, net
        # The loss of the wanted labels falls.
        self._sign = -1.0 if targeted else 1.0
        self._penalizing = plan.penalizing
        flat, objective = plan.capabilities.flat_attack_loss, plan.objective
        # The factor of the loss beside a penalty: that of the KL in the outer loss.
        self._factor = objective.kl_weight if flat and isinstance(objective, WeighsKL) else 1.0

    def __call__(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The loss of the batch, times the loss scale (0-dim)."""
        plan = self.plan
        loss = plan.attack_loss.mean(logits, y, context, plan.target.fit)
        penalty = self._penalty(logits, context)
        if self._sign < 0:
            loss = -loss
        if penalty is not None:
            loss = self._factor * loss + penalty.mean()
        scale = self.net.loss_scale(len(y))
        return loss if scale == 1.0 else loss * scale

    def per_sample(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The loss of each sample (B,), without the loss scale."""
        plan = self.plan
        losses = plan.attack_loss.per_sample(logits, y, context, plan.target.fit)
        penalty = self._penalty(logits, context)
        losses = self._sign * losses if self._sign < 0 else losses
        return losses if penalty is None else self._factor * losses + penalty

    def _penalty(self, logits: Tensor, context: Context) -> Tensor | None:
        if self._penalizing is None:
            return None
        return self._penalizing.penalty(logits, logits, context)
