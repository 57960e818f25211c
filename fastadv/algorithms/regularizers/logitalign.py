"""LogitAlign: x and a noisy x get alike adversarial predictions (AdvLC paper, ref. [24])."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from fastadv.algorithms.contract import (
    TRAINING,
    Adversarial,
    Batch,
    Capabilities,
    Conflict,
    Outputs,
    Pass,
    Regularizer,
    required,
)
from fastadv.algorithms.regularizers.divergence import kl
from fastadv.declared import NonNegative, option
from fastadv.engine.noise import noise_stream

NOISE = noise_stream("logitalign.noise")


class LogitAlign(Regularizer):
    """mean_i KL(p(x'_n) || p(x')), x'_n the adversary's example for x_n = box(x + U(+-s eps)).

    s is ``align_noise`` (1 or 2 in the co-authors' experiments). The second example costs a second
    attack by the same adversary. Their loss is a sum over the batch with weight 1; at the AdvLC
    paper's B = 100 that is its weight of 100 on the mean. Their box is the one around x; here x'_n
    is clipped to the range of images. They forward x' before they attack x_n and here it is
    forwarded afterwards, so BatchNorm's running statistics differ slightly. Both predictions are
    differentiated.
    """

    # Measured: on 8x8 images, whose input gradients are larger, the strength published for CIFAR-10
    # makes the loss diverge at a learning rate of 0.2.
    on_data: ClassVar[Mapping[str, Mapping[str, Any]]] = {"digits": {"reg_weight": 2.0}}

    reg_weight: NonNegative = option(100.0, "weight of the regularizer in the loss")
    align_noise: NonNegative = option(
        1.0, "half-width of the noise on the second image, in units of eps"
    )

    def requires(self) -> frozenset[str]:
        return frozenset({"class_logits"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.attacks_any_image:
            yield Conflict(
                "adversary",
                "LogitAlign attacks a second image; this adversary has no attack beside the outer "
                "pass's gradient.",
            )

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return Counter({Pass(TRAINING, "train"): 1})

    def neighbor(self, batch: Batch) -> Tensor:
        """See ``HasNeighbor``."""
        threat = batch.threat
        drawn = threat.movable(self.uniform(batch, NOISE))
        return threat.clip(batch.x + self.align_noise * threat.radius(batch.x) * drawn)

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        near = self.net.logits(required(outputs.context.neighbor_adv))
        return kl(near, outputs.adversarial).mean()
