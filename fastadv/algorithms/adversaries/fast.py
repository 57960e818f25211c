"""F+FGSM, "fast" adversarial training: one step from a random start (Wong et al., 2020)."""

from typing import ClassVar

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Context


class Fast(Ascent):
    """delta0 uniform in the ball, then one step of alpha = 1.25 eps, projected to the ball."""

    usual_alpha: ClassVar[float] = 1.25

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self.begin(batch)
        x_adv = self.net.run(self.ascend, start, batch.x, batch, context)
        return Adversarial(x_adv, batch.x, context, start)
