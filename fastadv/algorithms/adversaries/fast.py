"""F+FGSM, "fast" adversarial training: one step from a random start (Wong et al., 2020)."""

from typing import ClassVar

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Context


class Fast(Ascent):
    """delta0 uniform in the ball, then one step of alpha = 1.25 eps, projected to the ball.

    The upper end of the published start is that of the first channel in every channel
    (locuslab/fast_adversarial, train_fgsm.py). Its images are divided by a deviation per channel,
    so that delta0 is in [-eps, 0.985 eps] in green and in [-eps, 1.059 eps] in blue. That slip is
    not built: the paper states the ball.
    """

    usual_alpha: ClassVar[float] = 1.25

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self.begin(batch)
        x_adv = self.net.run(self.ascend, start, batch.x, batch, context)
        return Adversarial(x_adv, batch.x, context, start)
