"""The scalar that an attack maximises."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fastadv import kernels
from fastadv.algorithms.contract import Intermediates, computed
from fastadv.algorithms.plan import Plan
from fastadv.engine.model.network import Network


class AttackLoss:
    """The attack's own objective plus the target's term, the mean over the batch, times the factor
    that keeps a float16 gradient from flushing to zero (``Network.loss_scale``)."""

    def __init__(self, plan: Plan, net: Network) -> None:
        self.net = net
        self.kl = plan.adversary.attack_objective == "kl"
        self.target, self.objective = plan.target, plan.objective

    def __call__(self, logits: Tensor, y: Tensor, intermediates: Intermediates) -> Tensor:
        """0-dim, from ``logits`` (B,classes) of the attacked images and ``y`` (B,)."""
        if self.kl:
            natural = computed(intermediates.natural_logits_attack, "natural_logits_attack")
            loss = kernels.trades_kl(natural, logits)
        else:
            loss = functional.cross_entropy(logits, y, reduction="none")
        term = self.target.attack_term(logits, intermediates)
        if term is not None:
            loss = (self.objective.attack_scale() * loss if self.kl else loss) + term
        return loss.mean() * self.net.loss_scale(len(y))
