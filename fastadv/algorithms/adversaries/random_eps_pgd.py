"""PGD with another random radius for each image."""

from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.adversaries.pgd import PGD
from fastadv.algorithms.contract import Adversarial, Batch, Context
from fastadv.engine.noise import noise_stream
from fastadv.errors import UserError
from fastadv.threat import Threat

RADIUS = noise_stream("random-eps-pgd.radius")


class RandomEpsPGD(PGD):
    """PGD in the ball of u_i eps, u_i uniform in [0,1), drawn anew for each image and update.

    Unless ``alpha`` is given, the steps are in units of the image's own radius. With a warm-up of
    eps (``--eps-warmup``) the radii grow from 0. No publication draws its radii so; Kurakin et al.
    (2017) draw half-normal ones, for one step (``random-eps``).
    """

    draws_radii: ClassVar[bool] = True

    def check_threat(self, threat: Threat) -> None:
        super().check_threat(threat)
        if isinstance(threat.eps, tuple):
            raise UserError(
                "random-eps-pgd draws one radius per image: give one eps for all channels."
            )

    def make(self, batch: Batch, context: Context) -> Adversarial:
        share: Tensor = (self.uniform(batch, RADIUS, (1,)).squeeze(1) + 1) / 2
        own = batch.threat.filled(eps=share * batch.threat.eps)
        return super().make(batch._replace(threat=own), context)
