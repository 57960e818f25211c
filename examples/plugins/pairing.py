"""Logit pairing: f(x') is held near f(x) (Kannan et al., 2018, Sec. 4.1; no code is published).

fastadv train --plugin examples/plugins/pairing.py --method pairing
"""

from collections.abc import Iterable

from torch import Tensor

from fastadv import (
    Capabilities,
    Conflict,
    Fit,
    Objective,
    Outputs,
    Recipe,
    option,
    register,
    register_recipe,
    required,
)
from fastadv.declared import NonNegative


@register("pairing")
class Pairing(Objective):
    """fit(f(x'), y) + pairing |f(x') - f(x)|_2^2, differentiated through both logits."""

    pairing: NonNegative = option(0.5, "weight of the squared distance of the logits")

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict("adversary", "without an attack x' = x and the pairing is 0.")
        if method.labels != "classes":
            yield Conflict("target", "it compares logits of classes.")

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        distance = (outputs.adversarial - required(outputs.natural)).square().sum(1)
        return fit(outputs.adversarial, y, outputs.context) + self.pairing * distance


register_recipe(
    "pairing",
    Recipe(
        "AT, logits of x and x' held together",
        "Kannan et al. 2018, Sec. 4.1",
        objective="pairing",
        options={"attack_bn": "eval"},
        training={"epochs": 100, "lr": 0.05},
    ),
)
