"""KL to the natural prediction (TRADES: Zhang et al., 2019)."""

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import AttackLoss, Capabilities, Conflict, Context, Fit, required
from fastadv.errors import UserError
from fastadv.threat import Threat


class KLAttack(AttackLoss):
    """KL(p(x) || p(x')), p(x) from the forward pass of x before the attack, held fixed."""

    flat_at_center: ClassVar[bool] = True

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_attack", "class_logits"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if method.begins_at_center and not method.moves_center:
            yield Conflict(
                "adversary",
                "at x' = x the KL to f(x) has no gradient: take another start, such as "
                "start='gaussian'.",
            )

    def check_threat(self, threat: Threat) -> None:
        if threat.targeted:
            raise UserError(
                "The KL to f(x) has no label to aim at: take attack_loss='ce' for a targeted "
                "threat."
            )

    def per_sample(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        return kernels.trades_kl(required(context.natural_logits_attack), logits)
