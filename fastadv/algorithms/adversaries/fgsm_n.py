"""FGSM-N: FGSM on a noisy image (AdvLC paper, Sec. 5, after its ref. [24], "NoiseAug")."""

from dataclasses import dataclass

from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Context
from fastadv.engine import noise


@dataclass(eq=False)
class FGSMN(Ascent):
    """FGSM from a noisy image: the noise is an augmentation, not a start inside the ball.

    x~ = box(x + eta), eta uniform in the ball; x' = box(x~ + alpha sign grad CE(f(x~), y)) with
    alpha = eps, within eps of x~ and so up to 2 eps from x. The centre of the ball is x~, so the
    clean logits of a regularizer are f(x~). A given ``start`` is eta. ``attack_objective="kl"``
    compares with f(x), since at x' = x~ the KL to f(x~) has no gradient.
    """

    def make(self, batch: Batch, context: Context) -> Adversarial:
        noisy = self._noisy(batch)
        x_adv = self.net.run(self.ascend, noisy, noisy.clone(), batch.y, context)
        return Adversarial(x_adv, noisy, context, noisy)

    def joint_center(self, batch: Batch) -> Tensor | None:
        alike = self.attack_bn == "train" and self.attack_objective == "ce"
        return self._noisy(batch) if alike else None

    def _noisy(self, batch: Batch) -> Tensor:
        given = self.given_start(batch, batch.x)
        if given is not None:
            return given
        return self.setup.threat.start(
            batch.x, batch.index, self.setup.seed, batch.offset, noise.AUGMENTATION
        )
