"""A random corner of a cube around the image (GAT, NuAT: Sriramanan et al., 2020 and 2021)."""

import torch
from torch import Tensor

from fastadv.algorithms.contract import Batch
from fastadv.algorithms.starts.begun import Begun
from fastadv.declared import Share, option
from fastadv.engine.noise import RESTART, noise_stream

SIGNS = noise_stream("bernoulli.signs")


class Bernoulli(Begun):
    """x0 = box(x + s eps b), every element of b is 1 or -1 with equal probability.

    s is ``start_scale``: 0.5 in the published code of NuAT. A further restart draws other signs.
    """

    start_scale: Share = option(0.5, "distance of the start in each pixel, in units of eps")

    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        again = batch._replace(offset=batch.offset + restart * RESTART) if restart else batch
        signs = torch.where(self.uniform(again, SIGNS) < 0, -1.0, 1.0).to(batch.x.dtype)
        threat = batch.threat
        return threat.project(batch.x + self.start_scale * threat.radius(batch.x) * signs, batch.x)
