"""What the attack of a plan maximises: the loss of its part, plus the target's penalty."""

from __future__ import annotations

from torch import Tensor

from fastadv.algorithms.contract import AttackLoss, Context, WeighsKL
from fastadv.algorithms.contract.returned import fitted, number, per_image
from fastadv.algorithms.plan import Plan
from fastadv.engine.model.network import Network


class PlanAttackLoss:
    """The ``attack_loss`` of ``Setup``."""

    def __init__(self, plan: Plan, net: Network, *, targeted: bool) -> None:
        self.plan, self.net = plan, net
        # The loss of the wanted labels falls.
        self._sign = -1.0 if targeted else 1.0
        self._penalizing = plan.penalizing
        # True if the loss of a batch is the mean over its samples, and no term of the whole batch.
        own = plan.attack_loss
        self._of_samples = own.is_plain() or type(own).mean is AttackLoss.mean
        flat, objective = plan.capabilities.flat_attack_loss, plan.objective
        # The factor of the loss beside a penalty: that of the KL in the outer loss.
        self._factor = objective.kl_weight if flat and isinstance(objective, WeighsKL) else 1.0

    def __call__(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The loss of the batch, times the loss scale (0-dim)."""
        plan = self.plan
        penalty = None
        if self._penalizing is not None:
            penalty = self._penalizing.penalty(logits, logits, context)
        if penalty is not None and self._of_samples:
            loss = self._with_penalty(logits, y, context, penalty).mean()  # one mean for both
        else:
            own = plan.attack_loss
            loss = own.mean(logits, y, context, self._fit)
            if not isinstance(loss, Tensor) or loss.dim():  # looked at here to save a call per step
                number(loss, own, "mean")
            loss = -loss if self._sign < 0 else loss
            loss = loss if penalty is None else self._weighted(loss) + penalty.mean()
        scale = self.net.loss_scale(len(y))
        return loss if scale == 1.0 else loss * scale

    def per_sample(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The loss of each sample (B,), without the loss scale."""
        penalty = None
        if self._penalizing is not None:
            penalty = self._penalizing.penalty(logits, logits, context)
        return self._with_penalty(logits, y, context, penalty)

    def _with_penalty(
        self, logits: Tensor, y: Tensor, context: Context, penalty: Tensor | None
    ) -> Tensor:
        plan = self.plan
        own = plan.attack_loss
        losses = per_image(
            own.per_sample(logits, y, context, self._fit), len(logits), own, "per_sample"
        )
        losses = -losses if self._sign < 0 else losses
        return losses if penalty is None else self._weighted(losses) + penalty

    def _fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        if context.attack_targets is not None:
            context = context._replace(soft_targets=context.attack_targets)
        return fitted(self.plan.target, logits, y, context)

    def _weighted(self, loss: Tensor) -> Tensor:
        return loss if self._factor == 1.0 else self._factor * loss
