"""PGD in a ball that grows from 0, with another random radius for each sample.

fastadv train --plugin examples/plugins/eps_ramp.py --method eps-ramp --ramp-epochs 5
"""

import torch
from torch import Tensor

from fastadv import (
    PGD,
    Adversarial,
    Batch,
    Context,
    Recipe,
    Setup,
    Threat,
    UserError,
    noise_stream,
    option,
    register,
    register_recipe,
)
from fastadv.declared import Positive

RADIUS = noise_stream("eps-ramp.radius")


@register("eps-ramp")
class EpsRamp(PGD):
    """PGD of any number of steps in the ball of eps_i = u_i eps min(e / ``ramp_epochs``, 1).

    e is the position in the run in epochs, with its fraction, and u_i is uniform in [0,1), drawn
    anew for each sample and update. Unless ``alpha`` is given, the steps are in units of eps_i.
    """

    ramp_epochs: Positive = option(5.0, "epochs in which the radius rises from 0 to eps")

    def follows_epochs(self) -> bool:
        return True

    def check_threat(self, threat: Threat) -> None:
        super().check_threat(threat)
        if isinstance(threat.eps, tuple):
            raise UserError("eps-ramp draws one radius per image: give one eps for all channels.")

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self.share = torch.zeros((), device=setup.device, dtype=setup.dtype)

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        self.share.fill_(min(epoch / self.ramp_epochs, 1.0))

    def make(self, batch: Batch, context: Context) -> Adversarial:
        drawn = (self.uniform(batch, RADIUS, (1,)).squeeze(1) + 1) / 2
        own = batch.threat.filled(eps=drawn * self.share * batch.threat.eps)
        return super().make(batch._replace(threat=own), context)

    def unmoved(self, batch: Batch, attacked: Adversarial) -> Tensor | None:
        found = super().unmoved(batch, attacked)
        return None if found is None else found & (self.share > 0)


register_recipe(
    "eps-ramp",
    Recipe(
        "PGD-10 in a growing ball of random radius",
        "the ramp: LIONS-EPFL/ELLE on SVHN (first 5 epochs, in steps)",
        adversary="eps-ramp",
    ),
)
