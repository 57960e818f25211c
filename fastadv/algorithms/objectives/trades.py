"""TRADES: natural cross entropy plus a KL that ties x_adv to x (Zhang et al., 2019, Eq. 5)."""

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import Capabilities, Conflict, Fit, Objective, Outputs, required
from fastadv.declared import NonNegative, option
from fastadv.engine.model.bn_momentum import ADVERSARIAL, DEFAULT_BN_UPDATES, NATURAL, Pass
from fastadv.errors import UserError


class Trades(Objective):
    """fit(f(x), y) + beta * KL(p(x) || p(x')), differentiated through both predictions.

    x and x' are forwarded once each, as separate batches. ``bn_passes`` are the passes that update
    BatchNorm's running statistics: the published code forwards x, x' and x again.
    """

    fits: ClassVar[tuple[str, ...]] = ("natural",)

    suspects: ClassVar[tuple[str, ...]] = ("beta",)

    beta: NonNegative = option(
        6.0, "weight of the KL divergence between natural and adversarial prediction"
    )
    bn_passes: tuple[Pass, ...] = option(
        (NATURAL, ADVERSARIAL, NATURAL), "forward passes that move BatchNorm's running statistics"
    )

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train", "class_logits"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if set(self.bn_passes) != set(DEFAULT_BN_UPDATES):
            raise UserError(
                "bn_passes are natural and adversarial, each at least once, such as "
                f"natural,adversarial, not {','.join(self.bn_passes)!r}."
            )

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict(
                "adversary",
                "TRADES compares f(x') with f(x); without an attack x' = x and its KL is "
                "identically 0.",
            )

    def bn_updates(self) -> tuple[str, ...]:
        """See ``OrdersBatchNorm``."""
        return self.bn_passes

    @property
    def kl_weight(self) -> float:
        """See ``WeighsKL``."""
        return self.beta

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        natural, adversarial = required(outputs.natural), outputs.adversarial
        return fit(natural, y, outputs.context) + self.beta * kernels.trades_kl(
            natural, adversarial
        )
