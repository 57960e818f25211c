"""A recipe resolved: parts built with their options, checked against each other, once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

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
from fastadv.algorithms.options import default, option_types
from fastadv.algorithms.parts import NONE, OPTIONAL, PARTS, names
from fastadv.algorithms.recipe import beside
from fastadv.algorithms.recipes.table import Recipe, recipe
from fastadv.algorithms.refusals import refuse
from fastadv.declared import coerce
from fastadv.errors import unknown


@dataclass(frozen=True)
class Plan:
    """What one step does: a part in each slot, the options as resolved, and what is needed."""

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
        """Slot -> part, empty slots left out, in the order they act."""
        every = {slot: getattr(self, slot) for slot in PARTS}
        return {slot: part for slot, part in every.items() if part is not None}

    @cached_property
    def needs(self) -> frozenset[str]:
        """What the parts ask of the step and of the loader."""
        kl = {"natural_logits_attack"} if self.adversary.attack_objective == "kl" else set()
        return frozenset(kl).union(*(part.requires() for part in self.parts.values()))

    def wants(self, need: str) -> bool:
        """True if ``need`` is asked for by a part that is at work in this epoch."""
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
        """Whether a regularizer differentiates an input gradient (IGR, CURE, GradAlign)."""
        part = self.regularizer
        if part is None:
            return False
        return part.wants_center_gradient or part.wants_adversarial_gradient

    @cached_property
    def shares_natural_forward(self) -> bool:
        """True if the attack's forward at x can be reused as the loss's natural forward: the
        weights are the same and nothing else runs on x_adv in between."""
        between = self.weights is not None or "teacher_logits" in self.needs
        if self.regularizer is not None:
            between = between or self.regularizer.wants_neighbor or self.differentiates_twice
        return "natural_logits_train" in self.needs and not between

    @cached_property
    def updates_per_batch(self) -> int:
        return self.adversary.updates_per_batch


def resolve(method: str, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan of ``method`` with ``overrides``: a slot's name swaps its part, any other name is
    an option of one of the parts. Unknown names are errors that name the nearest known one."""
    row = recipe(method)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    slots = _choose_parts(row, given)
    classes = {slot: PARTS[slot][name] for slot, name in slots.items() if not _empty(slot, name)}
    known = _known_options(classes)
    wanted = {name: value for name, value in given.items() if name not in PARTS}
    for name in wanted:
        if name not in known:
            raise unknown(f"option for method {method!r}", name, [*known, *PARTS])
    # A recipe's own option whose part was swapped out no longer means anything, nor does the
    # strength of one regularizer for another.
    lost = option_types(Regularizer) if slots["regularizer"] != row.regularizer else {}
    own = {name: row.options[name] for name in row.options if name in known and name not in lost}
    settings = beside(slots) | own | wanted
    settings = {name: coerce(name, value, known[name]) for name, value in settings.items()}
    parts: dict[str, Any] = {
        slot: part(**{name: settings[name] for name in option_types(part) if name in settings})
        for slot, part in classes.items()
    }
    plan = Plan(
        method=method,
        recipe=row,
        slots=slots,
        options={name: settings.get(name, _default(classes, name)) for name in known},
        adversary=cast(Adversary, parts["adversary"]),
        objective=cast(Objective, parts["objective"]),
        target=cast(Target, parts["target"]),
        regularizer=parts.get("regularizer"),
        weights=parts.get("weights"),
        layers=cast(Layers, parts["layers"]),
        averaging=parts.get("averaging"),
    )
    refuse(plan)
    return plan


def _empty(slot: str, name: str) -> bool:
    return slot in OPTIONAL and name == NONE


def _choose_parts(row: Recipe, given: Mapping[str, Any]) -> dict[str, str]:
    slots = row.parts() | {slot: str(given[slot]) for slot in PARTS if slot in given}
    for slot, name in slots.items():
        if name not in names(slot):
            raise unknown(f"{slot}", name, names(slot))
    return slots


def _known_options(classes: Mapping[str, type[Part]]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for part in classes.values():
        known |= option_types(part)
    return known


def _default(classes: Mapping[str, type[Part]], name: str) -> Any:
    return next(default(part, name) for part in classes.values() if name in option_types(part))
