"""CURE: changes of the input gradient along the attack are penalised (Moosavi-Dezfooli et al.,
2019)."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.contract import (
    DOUBLE_BACKWARD,
    Adversarial,
    Batch,
    Capabilities,
    Context,
    Outputs,
    Pass,
    Regularizer,
)
from fastadv.declared import NonNegative, Positive, option
from fastadv.engine.gradient import differentiable_gradient, leaf
from fastadv.threat import Threat


class Cure(Regularizer):
    """mean_i |grad l_i(x_i + z_i) - grad l_i(x_i)|_2, both gradients differentiated twice.

    l_i is sample i's cross entropy (or the user's own loss) with running BatchNorm statistics, x
    the centre of the ball, z = eps sign(grad l(x)) (AdvLC paper, Sec. 5.1; in an L2 ball z has
    length eps). ``cure_length`` h in pixels gives z the same signs with |z|_2 = h per sample
    (F-Salehi/CURE_robustness). ``cure_squared`` squares the norm as the CURE paper prints; its code
    does not. x + z is not clipped to the box.
    """

    # Measured: on 8x8 images, whose input gradients are larger, the strength published for CIFAR-10
    # makes the loss diverge at a learning rate of 0.2.
    on_data: ClassVar[Mapping[str, Mapping[str, Any]]] = {"digits": {"reg_weight": 0.05}}

    reg_weight: NonNegative = option(4.0, "weight of the regularizer in the loss")
    cure_squared: bool = option(False, "square the norm, as printed in the paper")
    cure_length: Positive | None = option(None, "L2 length of the shift in pixels; none: eps")

    def requires(self) -> frozenset[str]:
        return frozenset({"differentiable_center"})

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return Counter({Pass(DOUBLE_BACKWARD, "eval"): 2})

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        with self.net.evaluating():
            here = self._gradient(attacked.center, batch.y, outputs.context)
            moved = leaf(attacked.center + self._displacement(here, batch.threat))
            there = self._gradient(moved, batch.y, outputs.context)
        change = (there - here).flatten(1)
        if self.cure_squared:
            return change.pow(2).sum(1).mean()
        return torch.linalg.vector_norm(change, dim=1).mean()

    def _gradient(self, x: Tensor, y: Tensor, context: Context) -> Tensor:
        """The gradient of each sample's own loss, (B,C,H,W)."""
        scale = self.net.loss_scale(1)
        loss = self.setup.label_loss(self.net.logits(x), y, context, "sum")
        return differentiable_gradient(loss * scale, x) / scale

    def _displacement(self, gradient: Tensor, threat: Threat) -> Tensor:
        direction = threat.movable(gradient.detach().sign())
        if self.cure_length is None and threat.norm == "linf":
            return threat.radius(gradient) * direction
        length = threat.radius(gradient) if self.cure_length is None else self.cure_length
        size = torch.linalg.vector_norm(direction.flatten(1), dim=1).clamp(min=1e-7)
        return length * direction / size.view(-1, 1, 1, 1)
