"""LogitAlign: x and a noisy x get alike adversarial predictions (AdvLC paper, ref. [24])."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import Adversarial, Batch, Outputs, Regularizer, required
from fastadv.algorithms.regularizers.divergence import kl
from fastadv.declared import NonNegative, option
from fastadv.engine import noise


@dataclass(eq=False)
class LogitAlign(Regularizer):
    """mean_i KL(p(x'_n) || p(x')), x'_n the adversary's example for x_n = box(x + U(+-s eps)).

    s is ``align_noise`` (1 or 2 in the co-authors' experiments). The second example costs a second
    attack by the same adversary. Their loss is a sum over the batch with weight 1; at the AdvLC
    paper's B = 100 that is its weight of 100 on the mean. Their box is the one around x; here x'_n
    is clipped to the range of images. Both predictions are differentiated.
    """

    classes_only: ClassVar[str] = "its KL compares predictions of classes"
    wants_neighbor: ClassVar[bool] = True

    reg_weight: NonNegative = option(100.0, "weight of the regularizer in the loss")
    align_noise: NonNegative = option(
        1.0, "half-width of the noise on the second image, in units of eps"
    )

    def neighbor(self, batch: Batch) -> Tensor:
        threat = self.setup.threat
        drawn = kernels.noise_uniform(
            batch.index,
            tuple(batch.x.shape[1:]),
            self.setup.seed,
            batch.offset,
            noise.REGULARIZER,
            batch.x.dtype,
        )
        noisy = batch.x + self.align_noise * threat.eps * drawn
        return noisy.clamp(threat.low, threat.high)

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        near = self.net.logits(required(outputs.context.neighbor_adv))
        return kl(near, outputs.adversarial).mean()
