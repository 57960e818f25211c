"""NuAT: the nuclear norm of the change of the logits (Sriramanan et al., 2021)."""

from collections.abc import Iterable

from torch import Tensor

from fastadv.algorithms.contract import (
    Adversarial,
    Batch,
    Capabilities,
    Conflict,
    Outputs,
    Regularizer,
    required,
)
from fastadv.algorithms.nuclear_norm import RisingWeight, nuclear


class NuclearNorm(RisingWeight, Regularizer):
    """|f(x') - f(x)|_* / B, differentiated through both logits.

    On a GPU singular values wait for the device: such a step is not captured.
    """

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train", "class_logits"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict("adversary", "without an attack x' = x and the norm is identically 0.")

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        return nuclear(outputs.adversarial - required(outputs.natural))
