"""ELLE and ELLE-A: errors of the local linearity of the loss (Abad Rocamora et al., 2024)."""

from collections import Counter
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.contract import (
    TRAINING,
    Adversarial,
    Batch,
    Capabilities,
    Outcome,
    Outputs,
    Pass,
    Regularizer,
    Setup,
    required,
)
from fastadv.declared import NonNegative, Share, option
from fastadv.engine.noise import noise_stream

FIRST, SECOND, BETWEEN = map(noise_stream, ("elle.first", "elle.second", "elle.between"))


class Elle(Regularizer):
    """mean_i (L(x_c) - (1-t) L(x_a) - t L(x_b))^2, x_c = (1-t) x_a + t x_b, L the cross entropy
    or the user's own loss.

    x_a and x_b are x + U(+-eps), not clipped to the box, also in an L2 ball; t is uniform in [0,1)
    per sample. The 3B images are one batch for BatchNorm, in training mode (LIONS-EPFL/ELLE,
    core/utils/train.py). Published weights on CIFAR-10: 1000 up to eps 8/255, 5000 up to 20/255,
    10000 above.
    """

    # Measured: on 8x8 images, whose losses bend more, the weights published for CIFAR-10 keep the
    # network from learning.
    on_data: ClassVar[Mapping[str, Mapping[str, Any]]] = {"digits": {"reg_weight": 3.0}}

    reg_weight: NonNegative = option(1000.0, "weight of the error of the local linearity")

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return Counter({Pass(TRAINING, "train"): 3})

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        threat = batch.threat
        radius = threat.radius(batch.x)
        a, b = (
            batch.x + radius * threat.movable(self.uniform(batch, stream))
            for stream in (FIRST, SECOND)
        )
        t = (self.uniform(batch, BETWEEN, (1,)) + 1) / 2
        c = torch.lerp(a, b, t[:, :, None, None])
        logits = self.net.logits(torch.cat([a, b, c]))
        losses = self.setup.label_loss(logits, torch.cat([batch.y] * 3), outputs.context, "none")
        at_a, at_b, at_c = losses.chunk(3)
        return (at_c - torch.lerp(at_a, at_b, t.squeeze(1).to(losses.dtype))).square().mean()


class ElleA(Elle):
    """ELLE's term with a weight that is 0 until local linearity is lost.

    The weight becomes ``reg_weight`` after an update whose term is above the mean of all terms
    before by ``reg_sensitivity`` of their standard deviations, and ``reg_decay`` times itself after
    any other. The first three terms are only collected.
    """

    reg_weight: NonNegative = option(4000.0, "weight of the error after it has jumped")
    reg_sensitivity: NonNegative = option(
        2.0, "jump, in standard deviations, that raises the weight"
    )
    reg_decay: Share = option(0.99, "factor of the weight after an update without a jump")

    def refuses_accumulation(self) -> str:
        return "its weight follows the term of every call"

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        # The number of terms, their mean, and the sum of their squared distances from it.
        self.history = torch.zeros(3, device=setup.device, dtype=torch.float64)
        self.current = torch.zeros((), device=setup.device, dtype=setup.dtype)
        self.state = {"elle_history": self.history, "elle_weight": self.current}

    def weight(self) -> Tensor:
        return self.current

    def after(self, outcome: Outcome, ok: Tensor) -> None:
        new, (count, mean, spread) = required(outcome.term).double(), self.history
        usual = mean + self.reg_sensitivity * (spread / count.clamp(min=1)).sqrt()
        jumped = (count > 2) & (new > usual)
        weight = torch.where(jumped, super().weight(), self.reg_decay * self.current)
        self.current.copy_(torch.where(ok, weight, self.current))
        later = mean + (new - mean) / (count + 1)
        history = torch.stack([count + 1, later, spread + (new - mean) * (new - later)])
        self.history.copy_(torch.where(ok, history, self.history))
