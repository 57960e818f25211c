"""NuAT's attack: the cross entropy and the nuclear norm (Sriramanan et al., 2021)."""

from torch import Tensor

from fastadv.algorithms.attack_losses.every_second import EverySecond
from fastadv.algorithms.contract import Context, Fit, required
from fastadv.algorithms.nuclear_norm import RisingWeight, nuclear


class NuclearAttack(RisingWeight, EverySecond):
    """fit(f(x'), y) + weight |f(x') - f(x)|_* / B; the norm only in every second update.

    The paper's formula has the norm in every update, the published code in every second. f(x) is in
    BatchNorm's training mode, a pass before the attack that moves the running statistics.
    """

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_first", "class_logits"})

    def mean(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        norm = nuclear(logits - required(context.natural_logits_first))
        return fit(logits, y, context).mean() + self.on * self.weight() * norm
