"""FGSM: one step of eps from the image itself (Goodfellow et al., 2015)."""

from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Capabilities, Context


class FGSM(Ascent):
    """x' = box(x + alpha sign grad CE(f(x), y)), alpha = eps."""

    @property
    def begins_at_center(self) -> bool:
        return True

    def own_start(self, batch: Batch, restart: int) -> Tensor:
        return batch.x

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self.begin(batch)
        x_adv = self.net.run(self.ascend, start, batch.x, batch, context)
        return Adversarial(x_adv, batch.x, context, start)

    def shares_forward(self, method: Capabilities) -> bool:
        """See ``SharesForward.shares_forward``."""
        return method.begins_at_center and self.attack_bn == "train"

    def joint_center(self, batch: Batch) -> Tensor | None:
        """See ``SharesForward.joint_center``."""
        return batch.x if batch.start is None else None
