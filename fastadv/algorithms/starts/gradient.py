"""A step as long as the gradient at the centre (the released code of AdvLC)."""

from collections import Counter
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import (
    INPUT_GRADIENT,
    Batch,
    Capabilities,
    Pass,
)
from fastadv.algorithms.start_points import in_ball
from fastadv.algorithms.starts.begun import Begun
from fastadv.engine.gradient import input_gradient, leaf


class Gradient(Begun):
    """x0 = x + g, g = grad CE at the centre x of the ball, of the mean over the images of a
    call in one process.

    In TreeLLi/Combating-RO-AdvLC (src/utils/train.py) the gradient of the clean pass, meant for the
    first step, is passed in the place of the initial perturbation. So the attack takes its first
    gradient at box(x + g), and its first step begins at x + g. g is not projected to the ball
    before that step, nor made longer: of a mean over 100 images it is short.

    It costs one forward and one backward pass more, and the forward pass moves BatchNorm's
    statistics in the attack's mode: published is the order x, x0, ..., x'. Where that mode is
    "train", the first clean pass of the outer loss does not move them again (unless a BatchNorm
    keeps a cumulative average or is called twice). Measured: 18 % of the first step's signs are
    others than those at x in a network of random weights, 10 % in a digits network trained by
    PGD-10, 0.4 to 1.9 % in those trained by one step. There the loss at x' differs from that of
    plain FGSM by -0.006 to 0.03. A targeted attack begins at x - g. A further restart begins at a
    random point of the ball.
    """

    forwards_center: ClassVar[bool] = True  # see ``ForwardsCenter``
    clipped: ClassVar[bool] = True  # see ``Clipped``

    def requires(self) -> frozenset[str]:
        return frozenset({"class_logits"})

    def refuses_accumulation(self) -> str | None:
        return "an attack begins as far away as the gradient of the mean loss of a call is long"

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return Counter({Pass(INPUT_GRADIENT, method.attack_bn): 1})

    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        if restart:
            return in_ball(batch, self.setup, restart)
        return self.net.run(self._moved, batch.x, batch)

    def _moved(self, x: Tensor, batch: Batch) -> Tensor:
        """x + g (B,C,H,W); a region."""
        x = leaf(x)
        scale = self.net.loss_scale(len(x))
        loss = functional.cross_entropy(self.net.logits(x), batch.attacked_y) * scale
        gradient = batch.threat.movable(input_gradient(loss, x) / scale)
        return x.detach() - gradient if batch.threat.targeted else x.detach() + gradient
