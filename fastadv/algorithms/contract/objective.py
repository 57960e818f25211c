"""The objective: the outer loss per sample."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.target import Fit
from fastadv.algorithms.contract.tensors import Outputs


class Objective(Part):
    """The outer loss, one value per sample. The weights part maximises the same function.

    A part that reads ``outputs.natural`` asks for ``natural_logits_train``. ``fits`` are the logits
    that are fitted to the label, "natural", "adversarial" or both. The first ones are those that a
    target follows. An objective that fits both passes ``outputs.natural_context`` with the natural
    ones.
    """

    fits: ClassVar[tuple[str, ...]] = ("adversarial",)

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        """The loss (B,) of one outer pass. ``y`` are the labels, ``fit`` the target's ``fit``."""
        raise NotImplementedError
