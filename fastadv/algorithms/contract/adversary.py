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
    """Makes x_adv from x. ``attack_objective`` is ``"ce"`` or ``"kl"`` (KL to natural logits).

    ``shrink`` and ``flip_signs`` weaken the perturbation that is trained on, whatever made it:
    the part of its length, and of its elements' signs, that is taken away (AdvLC, Fig. 4).
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
        """How many times one batch updates the weights (Free-m: m)."""
        return 1

    def make(self, batch: Batch, context: Context) -> Adversarial:
        raise NotImplementedError

    def unmoved(self, attacked: Adversarial) -> Tensor | None:
        """Which images (B,) the attack did not move although it may: their gradient was zero. None
        where it takes no steps beside the outer pass."""
        if attacked.start is None or not self.setup.threat.eps:
            return None
        # Some published starts are not cut to the box; the first step does that.
        start = attacked.start.clamp(self.setup.threat.low, self.setup.threat.high)
        same = (attacked.x_adv == start).flatten(1).all(1)
        if self.net.syncs_are_free and not same.any():
            return same
        # In a corner of the ball (where ATTA's memory ends) a gradient may point outside only.
        return same & ~self.setup.threat.at_edge(start, attacked.center)

    def joint_center(self, batch: Batch) -> Tensor | None:
        """The centre of the ball, where a single step begins there and in training mode: one
        forward pass then serves the attack and the outer pass. None where it cannot."""
        return None

    def joint_step(self, center: Tensor, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """x_adv, one step from ``center`` (requires grad), whose ``logits`` keep their graph."""
        raise NotImplementedError

    def leaves(self) -> list[Tensor]:
        """Tensors the outer backward differentiates beside the weights (APART's step sizes)."""
        return []

    def outer_input(
        self, batch: Batch, attacked: Adversarial, leaves: list[Tensor]
    ) -> tuple[Tensor, list[Tensor] | None]:
        """x_adv and the block noise of the outer pass, differentiable in ``leaves``."""
        return attacked.x_adv, None

    def after(
        self,
        batch: Batch,
        attacked: Adversarial,
        leaf_gradients: list[Tensor],
        input_gradient: Tensor | None,
        ok: Tensor,
    ) -> None:
        """Update the state from the outer pass's gradients, only where ``ok`` (0-dim bool)."""
