"""A resolved recipe: its parts with their options, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fastadv.algorithms.contract import (
    Adversary,
    Averaging,
    Layers,
    Objective,
    Part,
    Regularizer,
    Target,
    WeightPerturbation,
)
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.recipes.table import Recipe


@dataclass(frozen=True)
class Plan:
    """A method ready to run: a part for each slot (None for an empty one) and the resolved options.

    ``slots`` is slot -> name of its part, ``options`` name -> value, defaults included.
    """

    method: str
    recipe: Recipe
    slots: Mapping[str, str]
    options: Mapping[str, Any]
    adversary: Adversary
    objective: Objective
    target: Target
    regularizer: Regularizer | None
    weights: WeightPerturbation | None
    layers: Layers
    averaging: Averaging | None

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Slot -> part, without empty slots, in the order of ``PARTS``."""
        every = {slot: getattr(self, slot) for slot in PARTS}
        return {slot: part for slot, part in every.items() if part is not None}

    @cached_property
    def needs(self) -> frozenset[str]:
        """The entries of ``NEEDS`` that the parts ask of the step and of the loader; constant."""
        kl = {"natural_logits_attack"} if self.adversary.attack_objective == "kl" else set()
        return frozenset(kl).union(*(part.requires() for part in self.parts.values()))

    def wants(self, need: str) -> bool:
        """True if a part that is active in this epoch asks for ``need``."""
        if need not in self.needs:
            return False
        asking = [part for part in self.parts.values() if need in part.requires()]
        return not asking or any(part.active for part in asking)

    @cached_property
    def keeps_sample_state(self) -> bool:
        """True if a part keeps a row per training sample."""
        return any(part.sample_state() for part in self.parts.values())

    @cached_property
    def differentiates_twice(self) -> bool:
        """True if the regularizer differentiates an input gradient."""
        part = self.regularizer
        if part is None:
            return False
        return part.wants_center_gradient or part.wants_adversarial_gradient

    @cached_property
    def shares_natural_forward(self) -> bool:
        """True if the attack's forward pass at x can be reused as the natural one of the loss: the
        weights are the same, and no other pass runs in between."""
        between = self.weights is not None or "teacher_logits" in self.needs
        if self.regularizer is not None:
            between = between or self.regularizer.wants_neighbor or self.differentiates_twice
        return "natural_logits_train" in self.needs and not between

    @cached_property
    def updates_per_batch(self) -> int:
        """Updates of the weights per batch (Free-m: m)."""
        return self.adversary.updates_per_batch
