"""The adversary: it makes x_adv from x."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.tensors import Adversarial, Batch, Context
from fastadv.declared import Share, option


@dataclass(eq=False)
class Adversary(Part):
    """Makes x_adv from x.

    ``attack_objective`` is what the attack maximises: ``"ce"`` or ``"kl"`` (KL to the natural
    logits). ``shrink`` and ``flip_signs`` weaken the perturbation before the network trains on it,
    whatever the adversary: ``shrink`` is the share of its length that is taken away,
    ``flip_signs`` the share of its elements whose sign is flipped (AdvLC, Fig. 4).
    """

    wants_input_gradient: ClassVar[bool] = False
    attack_objective: Literal["ce", "kl"] = option(
        "ce", "what the attack maximises: cross entropy or KL to the natural prediction"
    )
    attack_bn: Literal["train", "eval"] = option("train", "mode of BatchNorm during the attack")
    shrink: Share = option(
        0.0, "share of the perturbation's length that is taken away before training on it"
    )
    flip_signs: Share = option(
        0.0, "share of the perturbation's elements whose sign is flipped before training on it"
    )

    @property
    def updates_per_batch(self) -> int:
        """Updates of the weights per batch (Free-m: m)."""
        return 1

    def make(self, batch: Batch, context: Context) -> Adversarial:
        """The attack on ``batch``: x_adv and the centre of its ball, both (B,C,H,W)."""
        raise NotImplementedError

    def unmoved(self, attacked: Adversarial) -> Tensor | None:
        """True for each image (B,) that the attack could have moved and did not, since its gradient
        was zero. None if the attack takes no steps of its own, or if they cannot move an image."""
        if attacked.start is None or not self.setup.threat.eps:
            return None
        # Some published starts are not clipped to the box; the first step clips them.
        start = attacked.start.clamp(self.setup.threat.low, self.setup.threat.high)
        same = (attacked.x_adv == start).flatten(1).all(1)
        if self.net.syncs_are_free and not same.any():
            return same
        # In a corner of the ball (a stored perturbation ends there) all steps may point outside.
        return same & ~self.setup.threat.at_edge(start, attacked.center)

    def joint_center(self, batch: Batch) -> Tensor | None:
        """The centre (B,C,H,W) of the ball if the attack is a single step from there in training
        mode: one forward pass then serves the attack and the outer pass. Otherwise None."""
        return None

    def joint_step(self, center: Tensor, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """x_adv (B,C,H,W), one step from ``center``, which requires grad. The graph of its
        ``logits`` (B,classes) is kept for the outer pass."""
        raise NotImplementedError

    def leaves(self) -> list[Tensor]:
        """The tensors beside the weights in which the outer pass is differentiated (learned step
        sizes)."""
        return []

    def outer_input(
        self, batch: Batch, attacked: Adversarial, leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """x_adv (B,C,H,W) and the noise of each block (None: no noise) in the outer pass,
        differentiable in ``leaves``."""
        return attacked.x_adv, None

    def after(
        self,
        batch: Batch,
        attacked: Adversarial,
        leaf_gradients: list[Tensor],
        input_gradient: Tensor | None,
        ok: Tensor,
    ) -> None:
        """Update the state from the gradients of the outer pass, only where ``ok`` (0-dim bool).

        ``leaf_gradients`` are those of ``leaves()``. ``input_gradient`` (B,C,H,W) is the one of
        x_adv, or None unless ``wants_input_gradient``.
        """
