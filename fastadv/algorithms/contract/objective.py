"""The objective: the outer loss of one sample."""

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
    """The outer loss, one value a sample; the weights part maximises the same function."""

    fits: ClassVar[str] = "adversarial"

    def is_plain(self) -> bool:
        """Whether it is exactly what the target fits on f(x')."""
        return False

    def passes(self) -> tuple[str, ...]:
        """The published code's training passes of x ("natural") and x' ("adversarial"), by which
        BatchNorm's statistics move; the activations need one of each."""
        return DEFAULT_BN_UPDATES

    def attack_scale(self) -> float:
        """The factor of KL(f(x) || f(x')) in the loss, where an attack adds a term to that KL."""
        return 1.0

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        """The loss (B,) of one pass; ``fit`` is the target's."""
        raise NotImplementedError
