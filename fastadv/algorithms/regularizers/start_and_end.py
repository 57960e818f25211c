"""The prediction where an attack begins and where it ends (FGSM-PGI: Jia et al., 2022)."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastadv.algorithms.contract import (
    TRAINING,
    Adversarial,
    Batch,
    Capabilities,
    Outputs,
    Pass,
    Regularizer,
)
from fastadv.declared import NonNegative, option
from fastadv.errors import UserError


class StartAndEnd(Regularizer):
    """mean (f(x') - f(x0))^2 over batch and classes, x0 the start of the attack.

    Both predictions are differentiated. The paper sums over the classes, its code takes their mean.
    The code keeps the graph of the attack's pass at x0; here x0 is forwarded again, without a
    second move of BatchNorm's running statistics.
    """

    # Measured: under a triangular cycle to 0.3 the published 10 ends in a constant prediction or in
    # a loss that is not finite, 3 and 1 do not.
    on_data: ClassVar[Mapping[str, Mapping[str, Any]]] = {"digits": {"reg_weight": 1.0}}

    reg_weight: NonNegative = option(10.0, "weight of the regularizer in the loss")

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return Counter({Pass(TRAINING, "train"): 1})

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        if attacked.start is None:
            raise UserError(
                "start-and-end compares the end of an attack with its start: take an adversary "
                "with gradient steps, such as 'fgsm-mep'."
            )
        with self.net.bn_momenta.still():
            first = self.net.logits(attacked.start)
        return (outputs.adversarial - first).square().mean()
