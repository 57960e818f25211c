"""TRADES: natural cross entropy plus a KL that ties x_adv to x (Zhang et al., 2019, Eq. 5)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv import kernels
from fastadv.contract import Fit, Objective, Outputs


@dataclass(eq=False)
class Trades(Objective):
    """fit(f(x), y) + beta * KL(p(x) || p(x')), the gradient flowing through both sides.

    x and x' are forwarded as separate batches, x first, each moving BatchNorm's running
    statistics once (the published code forwards x twice for the same activations).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"natural_logits_train"})
    fits: ClassVar[str] = "natural"

    beta: float = 6.0

    def attack_scale(self) -> float:
        return self.beta

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        natural, adversarial = outputs.natural, outputs.adversarial
        if natural is None:
            raise RuntimeError("TRADES was given no natural logits")
        return fit(natural, y, outputs.facts) + self.beta * kernels.trades_kl(natural, adversarial)
