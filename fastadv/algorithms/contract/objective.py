"""The objective: the outer loss per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.target import Fit
from fastadv.algorithms.contract.tensors import Outputs
from fastadv.engine.model.bn_momentum import DEFAULT_BN_UPDATES


@dataclass(eq=False)
class Objective(Part):
    """The outer loss, one value per sample. The weights part maximises the same function.

    ``fits`` says which logits are fitted to the label, "natural" or "adversarial".
    """

    fits: ClassVar[str] = "adversarial"

    def is_plain(self) -> bool:
        """True if the loss is exactly the target's on f(x')."""
        return False

    def bn_updates(self) -> tuple[str, ...]:
        """The order in which x ("natural") and x' ("adversarial") update the statistics of
        BatchNorm in the published code. x and x' are each forwarded once; their momenta are chosen
        so that the statistics match this order."""
        return DEFAULT_BN_UPDATES

    def attack_scale(self) -> float:
        """The factor of KL(f(x) || f(x')) in the loss. An attack on that KL multiplies it by this
        factor before it adds the target's term."""
        return 1.0

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        """The loss (B,) of one outer pass. ``y`` are the labels, ``fit`` the target's ``fit``."""
        raise NotImplementedError
