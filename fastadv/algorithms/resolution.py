"""From the name of a method and the user's overrides to a plan: parts are built once and
checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, cast

from fastadv.algorithms.contract import (
    Adversary,
    AttackLoss,
    Layers,
    Objective,
    Part,
    Regularizer,
    Target,
    option_names,
)
from fastadv.algorithms.options import option_types
from fastadv.algorithms.parts import PARTS, names
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.recipe import Recipe, beside
from fastadv.algorithms.recipes.table import recipe
from fastadv.algorithms.refusals import refuse
from fastadv.algorithms.registry import BASES, slot_of
from fastadv.algorithms.slots import NONE, OPTIONAL, SLOTS
from fastadv.declared import coerce
from fastadv.errors import UserError, unknown

VARIANT = "variant"
"""The name in ``overrides`` that chooses among the published forms of a method."""


def resolve(
    method: str,
    overrides: Mapping[str, Any] | None = None,
    taken: Collection[str] = (),
    spelled: Callable[[str], str] = str,
) -> Plan:
    """The plan of ``method`` with ``overrides``.

    "variant" in ``overrides`` chooses the published form of the method (``Recipe.variants``); the
    name of a slot replaces its part, by the name of another or by a part itself
    (``objective=Mart(beta=5)``), whose options are those it was built with; any other name is an
    option of one of the parts; a value of None is ignored. Raises ``UserError`` for an
    unknown name, with the nearest known one, for a value that an option does not take, and for
    parts that cannot be combined. ``taken`` are names that the caller takes itself: a misspelt name
    may mean one of them. ``spelled`` writes a name as the user does (the command line: --name).
    """
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    row = recipe(method)
    if VARIANT in given:
        row = row.of_variant(given.pop(VARIANT))
    own = {slot: given[slot] for slot in SLOTS if isinstance(given.get(slot), Part)}
    slots = choose_parts(row, given)
    classes = _classes(slots, own)
    known = _known(classes)
    wanted = {name: value for name, value in given.items() if name not in SLOTS}
    for name in wanted:
        if name not in known:
            raise _unknown_option(method, name, slots, known, taken, spelled)
    settings = _recipe_options(row, slots, known) | wanted
    settings = {name: coerce(spelled(name), value, known[name]) for name, value in settings.items()}
    settings |= _options_of(own)
    parts: dict[str, Any] = {}
    for slot, part in classes.items():
        if slot in own:
            parts[slot] = _unused(slot, own[slot])
            _require_no_options(slot, own[slot], wanted)
            continue
        takes = option_names(part)
        parts[slot] = part(**{name: settings[name] for name in takes if name in settings})
    # As they were given: a part may read a text in a way of its own (paths of teachers).
    options = {
        name: settings[name] if name in settings and slot not in own else getattr(part, name)
        for slot, part in parts.items()
        for name in option_names(type(part))
    }
    plan = Plan(
        method=method,
        recipe=row,
        slots=slots,
        options={name: options[name] for name in known},
        adversary=cast(Adversary, parts["adversary"]),
        attack_loss=cast(AttackLoss, parts["attack_loss"]),
        start=parts.get("start"),
        objective=cast(Objective, parts["objective"]),
        target=cast(Target, parts["target"]),
        regularizer=parts.get("regularizer"),
        weights=parts.get("weights"),
        layers=cast(Layers, parts["layers"]),
        averaging=parts.get("averaging"),
    )
    # A stored run names the recipe's own, which then does nothing.
    if slots["attack_loss"] != row.attack_loss and not plan.adversary.gradient_steps:
        raise UserError(
            f"attack_loss is what the steps of an attack follow, and {slots['adversary']!r} takes "
            "none of its own: omit it."
        )
    refuse(plan)
    return plan


def choose_parts(row: Recipe, given: Mapping[str, Any]) -> dict[str, str]:
    """Slot -> name of its part: the one in ``given``, otherwise the recipe's. Raises ``UserError``
    for an unknown name, and for a part that does not fit its slot."""
    slots = row.parts()
    for slot in SLOTS:
        if slot not in given:
            continue
        part = given[slot]
        if isinstance(part, Part):
            if not isinstance(part, BASES[slot]):
                raise UserError(
                    f"{slot}= takes a part derived from {BASES[slot].__name__}, and "
                    f"{type(part).__name__} is one of the slot {slot_of(type(part))}."
                )
            slots[slot] = _name_of(slot, type(part))
        elif isinstance(part, type) and issubclass(part, Part):
            raise UserError(
                f"{slot}= takes a part and not its class: write {slot}={part.__name__}(...)."
            )
        else:
            slots[slot] = str(part)
            if slots[slot] not in names(slot):
                raise unknown(slot, slots[slot], names(slot))
    if slots["adversary"] != row.adversary and "start" not in given:
        slots["start"] = NONE  # the recipe's start was that of its adversary
    return slots


def _name_of(slot: str, part: type[Part]) -> str:
    """The name of a part class: the one it is registered by, otherwise the class's."""
    registered = {kind: name for name, kind in PARTS[slot].items()}
    return registered.get(part, part.__name__)


def _unused(slot: str, part: Part) -> Part:
    if part.in_step:
        raise UserError(
            f"This {type(part).__name__} is the {slot} of another step and keeps its state: build "
            "one for each step."
        )
    return part


def _options_of(own: Mapping[str, Part]) -> dict[str, Any]:
    """The options of the parts that are passed: name -> value. Options of one name are one, so
    other parts of the method have the same. Raises ``UserError`` for two values."""
    found: dict[str, Any] = {}
    for part in own.values():
        for name in option_names(type(part)):
            value = getattr(part, name)
            if found.setdefault(name, value) != value:
                raise UserError(
                    f"{name} is {found[name]} in one of the parts that you pass and {value} in "
                    "another, and options of one name are one: give both the same value."
                )
    return found


def _require_no_options(slot: str, part: Part, wanted: Mapping[str, Any]) -> None:
    for name in option_names(type(part)):
        if name in wanted:
            raise UserError(
                f"{name} is an option of the {slot} that you pass: write "
                f"{type(part).__name__}({name}=...)."
            )


def _unknown_option(
    method: str,
    name: str,
    slots: Mapping[str, str],
    known: Mapping[str, Any],
    taken: Collection[str],
    spelled: Callable[[str], str],
) -> UserError:
    """The error for an option that no part of ``method`` has, with the parts that have it."""
    owners = {
        slot: [label for label, part in parts.items() if name in option_types(part)]
        for slot, parts in PARTS.items()
    }
    owners = {slot: labels for slot, labels in owners.items() if labels}
    if not owners:
        return unknown("option", name, [*known, *PARTS, VARIANT, *taken])
    shown = [f"{spelled(slot)} {_some(labels)}" for slot, labels in owners.items()]
    present = [f"{spelled(slot)} {slots[slot]}" for slot in owners]
    return UserError(
        f"{spelled(name)} belongs to {' and '.join(shown)}; this method is {method}, with "
        f"{' and '.join(present)}."
    )


def _some(labels: list[str]) -> str:
    return "|".join(labels[:4]) + ("|..." if len(labels) > 4 else "")


def _classes(slots: Mapping[str, str], own: Mapping[str, Part]) -> dict[str, type[Part]]:
    found: dict[str, type[Part]] = {}
    for slot, name in slots.items():
        if slot in own:
            found[slot] = type(own[slot])
        elif not (slot in OPTIONAL and name == NONE):
            found[slot] = PARTS[slot][name]
    return found


def recipe_options(row: Recipe, slots: Mapping[str, str]) -> dict[str, Any]:
    """The options that the recipe ``row`` and the combination of its parts set: name -> value.

    Options of the recipe whose part was replaced are left out. If the regularizer was replaced, its
    weight in the recipe is left out also: it was chosen for another penalty.
    """
    return _recipe_options(row, slots, known_options(slots))


def _recipe_options(
    row: Recipe, slots: Mapping[str, str], known: Mapping[str, Any]
) -> dict[str, Any]:
    lost = set(option_types(Regularizer)) if slots["regularizer"] != row.regularizer else set()
    if slots["objective"] != row.objective:
        # Objectives share names of options: the passes of one are not those of another.
        lost |= option_types(PARTS["objective"][row.objective]).keys()
    usual, found = beside(row.parts()), beside(slots)
    # What a replaced part takes beside another is not what the row takes with its own parts.
    lost |= {name for name in found if name not in usual or usual[name] != found[name]}
    own = {name: row.options[name] for name in row.options if name in known and name not in lost}
    return {name: value for name, value in found.items() if name in known} | own


def part_classes(slots: Mapping[str, str]) -> dict[str, type[Part]]:
    """Slot -> class of its part, without empty slots."""
    return _classes(slots, {})


def known_options(slots: Mapping[str, str]) -> dict[str, Any]:
    """Every option of the parts in ``slots``: name -> type."""
    return _known(_classes(slots, {}))


def _known(classes: Mapping[str, type[Part]]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for part in classes.values():
        known |= option_types(part)
    return known
