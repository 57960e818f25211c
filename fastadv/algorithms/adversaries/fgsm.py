"""FGSM: one step of eps from the image itself (Goodfellow et al., 2015)."""

from typing import Literal

import torch
from torch import Tensor

from fastadv.algorithms.adversaries.ascent import Ascent
from fastadv.algorithms.contract import Adversarial, Batch, Capabilities, Context
from fastadv.declared import option
from fastadv.threat import Threat

SHARES = {"half": 0.5, "none": 0.0}
"""``edge_gradient`` -> the share of the gradient that is left."""


class FGSM(Ascent):
    """x' = box(x + alpha sign grad CE(f(x), y)), alpha = eps.

    ``edge_gradient`` is for published code that differentiates through the clip of x to the range
    of images (tml-epfl/understanding-fast-adv-training). At a pixel at an end of the range, such as
    black or white, the clip is a tie of ``torch.max`` or ``min``. Before torch 1.7 its derivative
    is 0: FGSM leaves these pixels where they are ("none"). Since then it is 1/2, which changes no
    sign, but the gradient that a regularizer shares ("half"). The gradient of the loss itself is
    "whole".
    """

    edge_gradient: Literal["whole", "half", "none"] = option(
        "whole",
        "share of the attack's gradient that is left where a pixel is at an end of its range",
    )

    @property
    def begins_at_center(self) -> bool:
        return True

    def own_start(self, batch: Batch, restart: int) -> Tensor:
        return batch.x

    def followed(self, gradient: Tensor, x_adv: Tensor, threat: Threat) -> Tensor:
        if self.edge_gradient == "whole":
            return gradient
        low, high = threat.ends(x_adv)
        at_end = (x_adv <= low) | (x_adv >= high)
        return torch.where(at_end, SHARES[self.edge_gradient] * gradient, gradient)

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
