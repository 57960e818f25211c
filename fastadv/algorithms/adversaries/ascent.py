"""The step that all gradient attacks share: one forward pass, one input gradient, one projected
step."""

from collections import Counter
from dataclasses import field
from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.contract import (
    INPUT_GRADIENT,
    Adversarial,
    Adversary,
    Batch,
    Capabilities,
    Clipped,
    Context,
    Pass,
    Setup,
)
from fastadv.algorithms.contract.returned import images
from fastadv.algorithms.start_points import given, in_ball, near
from fastadv.by_epoch import ByEpoch, Phases, Ramp
from fastadv.declared import ChangingNonNegative, option
from fastadv.engine.gradient import gradients, input_gradient, leaf
from fastadv.errors import warn
from fastadv.threat import Threat


class Ascent(Adversary):
    """A gradient attack with steps of ``alpha`` in pixels; None is the usual step for its eps.

    ``attack_bn`` is the mode of BatchNorm during the attack. The attack's loss and its start are
    parts of their own.
    """

    takes_start: ClassVar[bool] = True
    takes_alpha: ClassVar[bool] = True
    usual_alpha: ClassVar[float] = 1.0  # in units of eps

    alpha: ChangingNonNegative | None = option(
        None, "step of the attack in pixels; none: the usual one for its eps"
    )

    _clips: bool = field(init=False, repr=False, default=False)  # each point before its gradient
    _follows_another: bool = field(init=False, repr=False, default=False)  # saves a call per step
    _alpha_now: Tensor | None = field(init=False, repr=False, default=None)  # of this epoch

    @property
    def chosen_step(self) -> float | ByEpoch | None:
        return self.alpha

    def usual_step(self, threat: Threat) -> float | Tensor:
        return threat.of_eps(self.usual_alpha)

    def step_size(self, batch: Batch) -> float | Tensor:
        """The size of one step in pixels: a number, 0-dim or (B,)."""
        if batch.alpha is not None:
            return batch.alpha
        if self._alpha_now is not None:
            return self._alpha_now
        return self.usual_step(batch.threat) if self.alpha is None else self.largest_alpha

    @property
    def largest_alpha(self) -> float:
        """The largest step of any epoch in pixels, if one was chosen, otherwise 0."""
        if isinstance(self.alpha, (Ramp, Phases)):
            return max(self.alpha.values())
        return self.alpha or 0.0

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        if self.alpha is not None and self.largest_alpha == 0:
            warn("alpha 0: the attack takes no step, and its result is its start.")
        self._clips = isinstance(setup.start, Clipped) and setup.start.clipped
        self._follows_another = type(self).followed is not Ascent.followed
        if isinstance(self.alpha, (Ramp, Phases)):
            self._alpha_now = torch.zeros((), device=setup.device, dtype=torch.float64)

    def follows_epochs(self) -> bool:
        return isinstance(self.alpha, (Ramp, Phases))

    def schedule(self, update: int, epoch: float) -> None:
        if self._alpha_now is not None and isinstance(self.alpha, (Ramp, Phases)):
            self._alpha_now.fill_(self.alpha.at(epoch))

    def check_threat(self, threat: Threat) -> None:
        threat.require_step(self.largest_alpha)

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return Counter({Pass(INPUT_GRADIENT, self.attack_bn): self.gradient_steps})

    def unmoved(self, batch: Batch, attacked: Adversarial) -> Tensor | None:
        moves = self.alpha is None or self.largest_alpha > 0
        return super().unmoved(batch, attacked) if moves else None

    def own_start(self, batch: Batch, restart: int) -> Tensor:
        """The start (B,C,H,W) if no start part is chosen: in the ball, or near x for a loss that
        has no gradient at x."""
        if self.setup.method.flat_attack_loss:
            return near(batch, self.setup, restart)
        return in_ball(batch, self.setup, restart)

    def begin(self, batch: Batch, restart: int = 0) -> Tensor:
        """The start (B,C,H,W): the caller's for the first restart, else the start part's, else the
        adversary's own."""
        chosen = given(batch) if restart == 0 else None
        if chosen is not None:
            return chosen
        start = self.setup.start
        if start is not None:
            return images(start.point(batch, restart), batch.x, start, "point")
        return self.own_start(batch, restart)

    def ascend(self, x_adv: Tensor, around: Tensor, batch: Batch, context: Context) -> Tensor:
        """One step from ``x_adv`` inside the ball around ``around``; a region."""
        gradient, _ = self.gradient_at(x_adv, batch, context)
        return self.moved(x_adv.detach(), gradient, around, batch)

    def moved(self, x_adv: Tensor, gradient: Tensor, around: Tensor, batch: Batch) -> Tensor:
        """``x_adv`` (B,C,H,W) after a step along ``gradient`` inside the ball around ``around``."""
        return batch.threat.step(x_adv, gradient, around, self.step_size(batch))

    def gradient_at(self, x_adv: Tensor, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
        """The gradient (B,C,H,W) of the attack's loss at ``x_adv``, times the loss scale, and the
        logits (B,classes) there. To be called in a region."""
        x_adv = leaf(batch.threat.clip(x_adv) if self._clips else x_adv)
        logits = self.net.logits(x_adv)
        y = batch.y if batch.targets is None else batch.targets  # attacked_y, without its call
        gradient = input_gradient(self.setup.attack_loss(logits, y, context), x_adv)
        if self._follows_another:
            gradient = self.followed(gradient, x_adv, batch.threat)
        return gradient, logits.detach()

    def followed(self, gradient: Tensor, x_adv: Tensor, threat: Threat) -> Tensor:
        """What a step follows, from the ``gradient`` at ``x_adv``; all are (B,C,H,W)."""
        return gradient

    def joint_step(
        self, center: Tensor, logits: Tensor, batch: Batch, context: Context
    ) -> tuple[Tensor, Tensor]:
        """See ``SharesForward.joint_step``."""
        loss = self.setup.attack_loss(logits, batch.attacked_y, context)
        (gradient,) = gradients(loss, [center], keep_graph=True)
        around = center.detach()
        gradient = self.followed(gradient, around, batch.threat)
        return self.moved(around, gradient, around, batch), gradient
