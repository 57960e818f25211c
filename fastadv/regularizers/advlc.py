"""AdvLC: the largest changes of the logits are penalised (AdvLC paper, Sec. 5 and Alg. 1)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv import kernels
from fastadv.contract import Adversarial, Batch, Outputs, Regularizer
from fastadv.errors import UserError


@dataclass(eq=False)
class AdvLC(Regularizer):
    """(1/B) * the sum of the k largest |f(x~) - f(x')| of the whole (B,classes) batch.

    k = int(top_fraction * B * classes); x~ is the centre of the ball (for FGSM-N the noisy
    image). Gradients flow through both sides.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"natural_logits_train"})

    top_fraction: float = 0.1

    def __post_init__(self) -> None:
        if not 0 < self.top_fraction <= 1:
            raise UserError("top_fraction must be above 0 and at most 1.")

    def term(self, batch: Batch, made: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        if outputs.natural is None:
            raise RuntimeError("AdvLC was given no natural logits")
        count = max(1, int(self.top_fraction * outputs.natural.numel()))
        largest = kernels.top_n_sum(outputs.natural, outputs.adversarial, count)
        return largest / len(batch.y)
