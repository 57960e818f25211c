"""FGSM-N: FGSM on a noisy image (AdvLC paper, Sec. 5, after its ref. [24], "NoiseAug")."""

from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Capabilities, Context
from fastadv.algorithms.start_points import given
from fastadv.engine import noise


class FGSMN(Ascent):
    """FGSM from a noisy image: the noise is an augmentation, not a start inside the ball.

    x~ = box(x + eta), eta uniform in the ball; x' = box(x~ + alpha sign grad CE(f(x~), y)) with
    alpha = eps, within eps of x~ and so up to 2 eps from x. The centre of the ball is x~, so the
    clean logits of a regularizer are f(x~). A given ``start`` is eta. An attack on the KL compares
    with f(x), since at x' = x~ the KL to f(x~) has no gradient. A start part says where in the ball
    around x~ the step begins; without one it is x~.
    """

    moves_center: ClassVar[bool] = True

    def make(self, batch: Batch, context: Context) -> Adversarial:
        noisy = self._noisy(batch)
        start = self.begin(batch._replace(x=noisy, start=None))
        x_adv = self.net.run(self.ascend, start, noisy.clone(), batch, context)
        return Adversarial(x_adv, noisy, context, start)

    def own_start(self, batch: Batch, restart: int) -> Tensor:
        return batch.x

    def shares_forward(self, method: Capabilities) -> bool:
        """See ``SharesForward.shares_forward``."""
        at_center = method.begins_at_center or not method.chosen_start
        return at_center and self.attack_bn == "train" and not method.flat_attack_loss

    def joint_center(self, batch: Batch) -> Tensor | None:
        """See ``SharesForward.joint_center``."""
        return self._noisy(batch)

    def _noisy(self, batch: Batch) -> Tensor:
        start = given(batch)
        if start is not None:
            return start
        where = (batch.x, batch.index, self.setup.seed, batch.offset)
        return batch.threat.start(*where, noise.AUGMENTATION)
