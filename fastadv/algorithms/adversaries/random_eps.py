"""FGSM with another random radius for each image (Kurakin et al., 2017)."""

from math import erf, sqrt
from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.adversaries.fgsm import FGSM
from fastadv.algorithms.contract import Adversarial, Batch, Context
from fastadv.engine.noise import noise_stream
from fastadv.errors import UserError
from fastadv.threat import Threat

RADIUS = noise_stream("random-eps.radius")


class RandomEps(FGSM):
    """x' = box(x + eps_i sign grad CE(f(x), y)), eps_i = |N(0, eps/2)| truncated at eps.

    eps_i is drawn anew for each image and update (Kurakin et al., 2017, Sec. 3;
    wanglouis49/pytorch-adversarial_box, adversarialbox/train.py). ``alpha``, if given, is the step
    of all images in their balls.
    """

    draws_radii: ClassVar[bool] = True

    def check_threat(self, threat: Threat) -> None:
        super().check_threat(threat)
        if isinstance(threat.eps, tuple):
            raise UserError("random-eps draws one radius per image: give one eps for all channels.")

    def make(self, batch: Batch, context: Context) -> Adversarial:
        return super().make(self._with_radii(batch), context)

    def joint_step(
        self, center: Tensor, logits: Tensor, batch: Batch, context: Context
    ) -> tuple[Tensor, Tensor]:
        """See ``SharesForward.joint_step``."""
        return super().joint_step(center, logits, self._with_radii(batch), context)

    def _with_radii(self, batch: Batch) -> Batch:
        share = (self.uniform(batch, RADIUS, (1,)).squeeze(1) + 1) / 2
        # The inverse of the distribution of |N(0,1)| below 2, in units of 2.
        radii = torch.erfinv(share * erf(sqrt(2))) / sqrt(2)
        return batch._replace(threat=batch.threat.filled(eps=radii * batch.threat.eps))
