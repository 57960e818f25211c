"""From the name of a method and the user's overrides to a plan: parts are built once and
checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from fastadv.algorithms.contract import Adversary, Layers, Objective, Part, Regularizer, Target
from fastadv.algorithms.options import default, option_types
from fastadv.algorithms.parts import PARTS, names
from fastadv.algorithms.plan import Plan
from fastadv.algorithms.recipe import beside
from fastadv.algorithms.recipes.table import Recipe, recipe
from fastadv.algorithms.refusals import refuse
from fastadv.algorithms.slots import NONE, OPTIONAL
from fastadv.declared import coerce
from fastadv.errors import UserError, unknown


def resolve(method: str, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan of ``method`` with ``overrides``.

    The name of a slot in ``overrides`` replaces its part; any other name is an option of one of the
    parts; a value of None is ignored. Raises ``UserError`` for an unknown name, with the nearest
    known one, for a value that an option does not take, and for parts that cannot be combined.
    """
    row = recipe(method)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    slots = choose_parts(row, given)
    classes = _classes(slots)
    known = known_options(slots)
    wanted = {name: value for name, value in given.items() if name not in PARTS}
    for name in wanted:
        if name not in known:
            raise _unknown_option(method, name, known)
    settings = recipe_options(row, slots) | wanted
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


def choose_parts(row: Recipe, given: Mapping[str, Any]) -> dict[str, str]:
    """Slot -> name of its part: the one in ``given``, otherwise the recipe's. Raises ``UserError``
    for an unknown name."""
    slots = row.parts() | {slot: str(given[slot]) for slot in PARTS if slot in given}
    for slot, name in slots.items():
        if name not in names(slot):
            raise unknown(f"{slot}", name, names(slot))
    return slots


def _unknown_option(method: str, name: str, known: Mapping[str, Any]) -> UserError:
    """The error for an option that no part of ``method`` has, with the parts that have it."""
    owners = [
        f"{slot} {label!r}"
        for slot, parts in PARTS.items()
        for label, part in parts.items()
        if name in option_types(part)
    ]
    if not owners:
        return unknown("option", name, [*known, *PARTS])
    some = ", ".join(owners[:3]) + (", ..." if len(owners) > 3 else "")
    return UserError(f"{name!r} is an option of {some}, which {method} as set here does not use.")


def _classes(slots: Mapping[str, str]) -> dict[str, type[Part]]:
    return {slot: PARTS[slot][name] for slot, name in slots.items() if not _empty(slot, name)}


def recipe_options(row: Recipe, slots: Mapping[str, str]) -> dict[str, Any]:
    """The options that the recipe ``row`` and the combination of its parts set: name -> value.

    Options of the recipe whose part was replaced are left out. If the regularizer was replaced, its
    weight in the recipe is left out also: it was chosen for another penalty.
    """
    known = known_options(slots)
    lost = option_types(Regularizer) if slots["regularizer"] != row.regularizer else {}
    own = {name: row.options[name] for name in row.options if name in known and name not in lost}
    return beside(slots) | own


def known_options(slots: Mapping[str, str]) -> dict[str, Any]:
    """Every option of the parts in ``slots``: name -> type."""
    known: dict[str, Any] = {}
    for part in _classes(slots).values():
        known |= option_types(part)
    return known


def _default(classes: Mapping[str, type[Part]], name: str) -> Any:
    return next(default(part, name) for part in classes.values() if name in option_types(part))
