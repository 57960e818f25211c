"""IGR: the input gradient of the loss is penalised (Ross and Doshi-Velez, 2018)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import Adversarial, Batch, Outputs, Regularizer
from fastadv.declared import NonNegative, option
from fastadv.engine.gradient import differentiable_gradient


@dataclass(eq=False)
class IGR(Regularizer):
    """|grad_x' L|_2^2, L the batch's mean cross entropy at x', summed over the whole batch.

    The gradient is taken at x' (x without an attack), which is held fixed, as in the original code
    for adversarial training. It is the gradient of the mean loss, so the share of a sample has the
    factor 1/B^2; published weights of 1000 and more presuppose that (AdvLC paper, Eq. 10 and
    Sec. 5.1; no code). The term reuses the outer forward pass and costs one double backward.
    """

    wants_adversarial_gradient: ClassVar[bool] = True

    reg_weight: NonNegative = option(1000.0, "weight of the regularizer in the loss")

    def refuses_accumulation(self) -> str | None:
        return "its term is the squared gradient of the mean loss over the images of a call"

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        scale = self.net.loss_scale(len(batch.y))
        loss = functional.cross_entropy(outputs.adversarial, batch.y)
        gradient = differentiable_gradient(loss * scale, x_adv) / scale
        return gradient.pow(2).sum()
