"""The step that all gradient attacks share: one forward pass, one input gradient, one projected
step."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import Adversarial, Adversary, Batch, Context
from fastadv.declared import NonNegative, option
from fastadv.engine import noise
from fastadv.engine.gradient import gradients, input_gradient, leaf
from fastadv.threat import Threat


@dataclass(eq=False)
class Ascent(Adversary):
    """A gradient attack with steps of ``alpha`` in pixels; None is the usual step for its eps.

    ``attack_bn`` is the mode of BatchNorm during the attack. ``attack_objective`` is what the
    attack maximises: cross entropy, or KL(f(x) || f(x')) as in TRADES.
    """

    alpha: NonNegative | None = option(
        None, "step of the attack in pixels; none: the usual one for its eps"
    )
    attack_bn: Literal["train", "eval"] = option("train", "mode of BatchNorm during the attack")
    attack_objective: Literal["ce", "kl"] = option(
        "ce", "what the attack maximises: cross entropy or KL to the natural prediction"
    )

    usual_alpha: ClassVar[float] = 1.0  # in units of eps

    @property
    def step_size(self) -> float:
        """The size of one step in pixels."""
        return self.usual_alpha * self.setup.threat.eps if self.alpha is None else self.alpha

    def check_threat(self, threat: Threat) -> None:
        threat.require_step(self.alpha)

    def unmoved(self, attacked: Adversarial) -> Tensor | None:
        return super().unmoved(attacked) if self.step_size else None

    def given_start(self, batch: Batch, around: Tensor) -> Tensor | None:
        """``around`` plus the caller's start, projected to the ball and the box (B,C,H,W); None if
        the caller gave none."""
        if batch.start is None:
            return None
        return self.setup.threat.project(around + batch.start, around)

    def random_point(self, batch: Batch, restart: int = 0) -> Tensor:
        """The start (B,C,H,W) of the attack: in the ball for CE, x + 0.001 N(0,1) for KL (TRADES).

        At x itself a KL objective has no gradient. The small Gaussian start of the published code
        is not clipped to the box; the first step clips it.
        """
        stream = noise.START + restart
        if self.attack_objective == "kl":
            return self.near(batch, stream)
        seed, offset = self.setup.seed, batch.offset
        return self.setup.threat.start(batch.x, batch.index, seed, offset, stream)

    def near(self, batch: Batch, stream: int) -> Tensor:
        """x + 0.001 N(0,1), drawn from ``stream`` (B,C,H,W)."""
        shape, dtype = tuple(batch.x.shape[1:]), batch.x.dtype
        seed, offset = self.setup.seed, batch.offset
        drawn = kernels.noise_normal(batch.index, shape, seed, offset, stream, dtype)
        return batch.x + 0.001 * drawn

    def ascend(self, x_adv: Tensor, around: Tensor, y: Tensor, context: Context) -> Tensor:
        """One step from ``x_adv`` inside the ball around ``around``; a region."""
        return self.ascend_with_logits(x_adv, around, y, context)[0]

    def ascend_with_logits(
        self, x_adv: Tensor, around: Tensor, y: Tensor, context: Context
    ) -> tuple[Tensor, Tensor]:
        """``ascend``, and the logits (B,classes) before the step."""
        x_adv = leaf(x_adv)
        logits = self.net.logits(x_adv)
        gradient = input_gradient(self._loss(logits, y, context), x_adv)
        moved = self.setup.threat.step(x_adv.detach(), gradient, around, self.step_size)
        return moved, logits.detach()

    def _loss(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The scalar whose input gradient is the direction of a step."""
        loss = self.setup.attack_loss(logits, y, context)
        if self.setup.threat.norm == "linf" or self.net.loss_scale(len(y)) != 1.0:
            return loss
        # The L2 step divides by |g| + 1e-10: with the gradient of the mean, the step of a sample
        # would depend on the size of its batch.
        return loss * len(y)

    def joint_step(self, center: Tensor, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        loss = self._loss(logits, y, context)
        (gradient,) = gradients(loss, [center], keep_graph=True)
        around = center.detach()
        return self.setup.threat.step(around, gradient, around, self.step_size)
