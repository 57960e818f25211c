"""The adversary: it makes x_adv from x."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.tensors import Adversarial, Batch, Context
from fastadv.by_epoch import ByEpoch
from fastadv.declared import Share, option
from fastadv.threat import Threat


class Adversary(Part):
    """Makes x_adv from x.

    ``shrink`` and ``flip_signs`` weaken the perturbation before the network trains on it, whatever
    the adversary: ``shrink`` is the share of its length that is taken away, ``flip_signs`` the
    share of its elements whose sign is flipped (AdvLC, Fig. 4).

    The class variables are what other parts may ask of an adversary (``Capabilities``).
    """

    attacks: ClassVar[bool] = True
    takes_start: ClassVar[bool] = False
    takes_alpha: ClassVar[bool] = False  # a step for each image, ``Batch.alpha``
    draws_radii: ClassVar[bool] = False  # another radius for each image, and a usual step of it

    attack_bn: Literal["train", "eval"] = option("train", "mode of BatchNorm during the attack")
    shrink: Share = option(
        0.0, "share of the perturbation's length that is taken away before training on it"
    )
    flip_signs: Share = option(
        0.0, "share of the perturbation's elements whose sign is flipped before training on it"
    )

    @property
    def chosen_step(self) -> float | ByEpoch | None:
        """The size of one step in pixels, if the user has chosen one."""
        return None

    def usual_step(self, threat: Threat) -> float | Tensor:
        """The size of one step in pixels if nobody chose one, in the form of ``threat.eps``."""
        return threat.eps

    @property
    def gradient_steps(self) -> int:
        """The number of its gradient steps, each with a pass of its own."""
        return 1

    def make(self, batch: Batch, context: Context) -> Adversarial:
        """The attack on ``batch``: x_adv and the centre of its ball, both (B,C,H,W)."""
        raise NotImplementedError

    def unmoved(self, batch: Batch, attacked: Adversarial) -> Tensor | None:
        """True for each image (B,) that the attack could have moved and did not, since its gradient
        was zero. None if the attack takes no steps of its own, or if they cannot move an image."""
        threat = batch.threat
        if attacked.start is None or not threat.nominal:
            return None
        ended = attacked.x_adv if attacked.stepped is None else attacked.stepped
        if not self.net.syncs_are_free:
            return threat.unmoved(ended, attacked.start, attacked.center)
        # Some published starts are not clipped to the box; the first step clips them.
        start = threat.clip(attacked.start)
        same = (ended == start).flatten(1).all(1)
        if not same.any():
            return same
        # In a corner of the ball (a stored perturbation ends there) all steps may point outside.
        return same & ~threat.at_edge(start, attacked.center)
