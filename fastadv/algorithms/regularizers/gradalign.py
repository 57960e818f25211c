"""GradAlign: input gradients at x and near x get the same direction (Andriushchenko and
Flammarion, 2020)."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.contract import (
    DOUBLE_BACKWARD,
    INPUT_GRADIENT,
    SHARED,
    TRAINING,
    Adversarial,
    Batch,
    Capabilities,
    Outputs,
    Pass,
    Regularizer,
    required,
)
from fastadv.declared import NonNegative, option
from fastadv.engine.gradient import differentiable_gradient, gradients, leaf
from fastadv.engine.noise import noise_stream

NEAR = noise_stream("gradalign.near")


class GradAlign(Regularizer):
    """1 - mean_i cos(g1_i, g2_i), g1 = grad CE at x, g2 = grad CE at x + U(+-eps), not clipped to
    the box.

    CE is the cross entropy, or the user's own loss in its place. x is the centre of the ball; also
    in an L2 ball the noise is uniform in each pixel. Samples with a zero gradient are left out of
    the mean; if all are left out, the term is 0. For an attack of one step g1 is a constant; for
    more steps both gradients are differentiated again. BatchNorm is in training mode
    (tml-epfl/understanding-fast-adv-training).

    An attack of one step from x along the cross entropy has just computed g1, which is taken from
    it: the published three forward passes of x, x' and x + U. After any other attack, and for a
    targeted threat, x is forwarded once more. What the published clip does to g1 at black and white
    pixels is ``edge_gradient`` of FGSM.
    """

    # Measured: on 8x8 images, whose input gradients are larger, the strength published for CIFAR-10
    # keeps the network at chance at a learning rate of 0.2.
    on_data: ClassVar[Mapping[str, Mapping[str, Any]]] = {"digits": {"reg_weight": 0.5}}

    reads_center_gradient: ClassVar[bool] = True  # see ``ReadsCenterGradient``

    reg_weight: NonNegative = option(0.2, "weight of the regularizer in the loss")

    def refuses_accumulation(self) -> str | None:
        return "it takes the mean over those images of a call whose gradients are not zero"

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train", "differentiable_center"})

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        if method.gradient_steps > 1:
            center = DOUBLE_BACKWARD
        else:
            center = SHARED if method.objective_reads_center else INPUT_GRADIENT
        found = Counter({Pass(DOUBLE_BACKWARD, "train"): 1})
        # The pass over the centre becomes another kind.
        found[Pass(SHARED if method.shares_gradient else TRAINING, "train")] -= 1
        found[Pass(center, "train")] += 1
        return found

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        here = outputs.context.center_gradient
        if here is None:
            here = self._first_gradient(batch, attacked.center, outputs)
        near = leaf(self._near(batch, attacked.center))
        scale = self.net.loss_scale(len(batch.y))
        loss = self.setup.label_loss(self.net.logits(near), batch.y, outputs.context) * scale
        return one_minus_cosine(here, differentiable_gradient(loss, near))

    def _first_gradient(self, batch: Batch, center: Tensor, outputs: Outputs) -> Tensor:
        loss = self.setup.label_loss(required(outputs.natural), batch.y, outputs.context)
        loss = loss * self.net.loss_scale(len(batch.y))
        if self.setup.method.gradient_steps > 1:
            return differentiable_gradient(loss, center)
        return gradients(loss, [center], keep_graph=True)[0]

    def _near(self, batch: Batch, center: Tensor) -> Tensor:
        return center + batch.threat.radius(center) * batch.threat.movable(
            self.uniform(batch, NEAR)
        )


def one_minus_cosine(first: Tensor, second: Tensor) -> Tensor:
    """1 - the mean cosine (0-dim) of corresponding rows (B,...), over the pairs without a zero row;
    0 if there is no such pair."""
    first, second = first.flatten(1), second.flatten(1)
    used = first.detach().ne(0).any(1) & second.detach().ne(0).any(1)
    # Rows that are left out are replaced before the division: their derivative is 0, not 0/0.
    first = torch.where(used[:, None], first, 1.0)
    second = torch.where(used[:, None], second, 1.0)
    lengths = [torch.linalg.vector_norm(rows, dim=1) for rows in (first, second)]
    cosine = ((first / lengths[0][:, None]) * (second / lengths[1][:, None])).sum(1)
    count = used.sum()
    return (torch.where(used, 1 - cosine, 0.0)).sum() / count.clamp(min=1)
