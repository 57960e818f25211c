"""TRADES: natural cross entropy plus a KL that ties x_adv to x (Zhang et al., 2019, Eq. 5)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import Fit, Objective, Outputs, required
from fastadv.declared import NonNegative, option
from fastadv.engine.model.bn_momentum import ADVERSARIAL, DEFAULT_BN_UPDATES, NATURAL, Pass
from fastadv.errors import UserError


@dataclass(eq=False)
class Trades(Objective):
    """fit(f(x), y) + beta * KL(p(x) || p(x')), differentiated through both predictions.

    x and x' are forwarded once each, as separate batches. ``bn_passes`` are the passes that update
    BatchNorm's running statistics: the published code forwards x, x' and x again.
    """

    classes_only: ClassVar[str] = "its KL compares predictions of classes"
    fits: ClassVar[str] = "natural"

    beta: NonNegative = option(
        6.0, "weight of the KL divergence between natural and adversarial prediction"
    )
    bn_passes: tuple[Pass, ...] = option(
        (NATURAL, ADVERSARIAL, NATURAL), "forward passes that move BatchNorm's running statistics"
    )

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.bn_passes) != set(DEFAULT_BN_UPDATES):
            raise UserError(
                "bn_passes are natural and adversarial, each at least once, such as "
                f"natural,adversarial, not {','.join(self.bn_passes)!r}."
            )

    def bn_updates(self) -> tuple[str, ...]:
        return self.bn_passes

    def attack_scale(self) -> float:
        return self.beta

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        natural, adversarial = required(outputs.natural), outputs.adversarial
        return fit(natural, y, outputs.context) + self.beta * kernels.trades_kl(
            natural, adversarial
        )
