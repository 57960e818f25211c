"""N-FGSM: one step from noise of twice eps, without projection (de Jorge et al., 2022)."""

from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Context
from fastadv.declared import NonNegative, option
from fastadv.engine import noise


class NFGSM(Ascent):
    """x' = box(x0 + alpha sign grad CE(f(x0), y)), x0 = box(x + eta), eta ~ U(-k eps, k eps).

    k is ``noise_scale`` (2), alpha = eps. Unlike in FGSM-N, the centre is the clean image x. Unlike
    in F+FGSM, x' is not projected to the ball and may be (k + 1) eps away. A given ``start`` is
    eta. A start part replaces x0, and k then does nothing. In L2, which the paper does not have,
    eta has a Gaussian direction and a length uniform in [0, k eps], and the step the length alpha.
    """

    noise_scale: NonNegative = option(2.0, "half-width of the initial noise, in units of eps")

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self.begin(batch)
        x_adv = self.net.run(self._unprojected, start, batch, context)
        return Adversarial(x_adv, batch.x, context, start)

    def begin(self, batch: Batch, restart: int = 0) -> Tensor:
        threat = batch.threat
        if batch.start is not None:
            return threat.clip(batch.x + threat.movable(batch.start))
        return super().begin(batch, restart)

    def own_start(self, batch: Batch, restart: int) -> Tensor:
        wide = batch.threat.scaled(self.noise_scale)
        where = (batch.x, batch.index, self.setup.seed, batch.offset)
        return wide.start(*where, noise.AUGMENTATION)

    def _unprojected(self, x0: Tensor, batch: Batch, context: Context) -> Tensor:
        """One step from ``x0``, clipped to the box only; a region."""
        gradient, _ = self.gradient_at(x0, batch, context)
        x0 = x0.detach()
        return batch.threat.unbounded().step(x0, gradient, x0, self.step_size(batch))
