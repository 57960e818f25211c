"""IGR: the input gradient of the loss is penalised (Ross and Doshi-Velez, 2018)."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastadv.algorithms.contract import (
    DOUBLE_BACKWARD,
    TRAINING,
    Adversarial,
    Batch,
    Capabilities,
    Outputs,
    Pass,
    Regularizer,
)
from fastadv.declared import NonNegative, option
from fastadv.engine.gradient import differentiable_gradient


class IGR(Regularizer):
    """|grad_x' L|_2^2, L the batch's mean cross entropy at x', summed over the whole batch; the
    user's own loss in its place if there is one.

    The gradient is taken at x' (x without an attack), which is held fixed, as in the original code
    for adversarial training. It is the gradient of the mean loss, so the share of a sample has the
    factor 1/B^2; published weights of 1000 and more presuppose that (AdvLC paper, Eq. 10 and
    Sec. 5.1; no code). The original code (dtak/adversarial-robustness-public) takes half of that
    sum: a weight there is half of it here. The term reuses the outer forward pass and costs one
    double backward.
    """

    # Measured: on 8x8 images, whose input gradients are larger, the strength published for CIFAR-10
    # makes the loss diverge at a learning rate of 0.2.
    on_data: ClassVar[Mapping[str, Mapping[str, Any]]] = {"digits": {"reg_weight": 1.0}}

    reg_weight: NonNegative = option(1000.0, "weight of the regularizer in the loss")

    def requires(self) -> frozenset[str]:
        return frozenset({"differentiable_input"})

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        # The pass over x_adv becomes one with a double backward.
        return Counter({Pass(TRAINING, "train"): -1, Pass(DOUBLE_BACKWARD, "train"): 1})

    def refuses_accumulation(self) -> str | None:
        return "its term is the squared gradient of the mean loss over the images of a call"

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        scale = self.net.loss_scale(len(batch.y))
        loss = self.setup.label_loss(outputs.adversarial, batch.y, outputs.context)
        gradient = differentiable_gradient(loss * scale, x_adv) / scale
        return gradient.pow(2).sum()
