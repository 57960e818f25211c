"""GAT: the squared change of the prediction (Sriramanan et al., 2020)."""

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
from fastadv.algorithms.guidance import LateWeight, change


class Guided(LateWeight, Regularizer):
    """mean_i |softmax f(x') - softmax f(x)|_2^2, differentiated through both predictions."""

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train", "class_logits"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks:
            yield Conflict("adversary", "without an attack x' = x and the square is identically 0.")

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        return change(outputs.adversarial, required(outputs.natural)).mean()
