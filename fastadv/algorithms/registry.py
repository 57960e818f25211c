"""Parts and recipes from elsewhere: they join the tables and are then like our own."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING
from typing import TypeVar

from fastadv.algorithms.contract import (
    Adversary,
    AttackLoss,
    Averaging,
    Layers,
    Objective,
    Part,
    Regularizer,
    Start,
    Target,
    WeightPerturbation,
    option_names,
)
from fastadv.algorithms.options import all_options, default
from fastadv.algorithms.parts import PARTS, names
from fastadv.algorithms.recipe import Recipe
from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.slots import NONE
from fastadv.errors import UserError, brief, unknown

Kind = TypeVar("Kind", bound=type[Part])

BASES: Mapping[str, type[Part]] = {
    "adversary": Adversary,
    "attack_loss": AttackLoss,
    "start": Start,
    "objective": Objective,
    "target": Target,
    "regularizer": Regularizer,
    "weights": WeightPerturbation,
    "layers": Layers,
    "averaging": Averaging,
}
"""Slot -> the class of the parts that fit it."""

_NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")


def register(name: str) -> Callable[[Kind], Kind]:
    """A decorator that adds a part under ``name``, such as "mart"; its class decides the slot.

    The part can then be named wherever fastadv's own can: in ``fastadv.step``, in recipes, on the
    command line and in the ``config.toml`` of a run. Raises ``UserError`` for a name with other
    characters than small letters, digits and hyphens, a name that another part of this slot has,
    a class that is no part, and an option without a default.
    """

    def add(part: Kind) -> Kind:
        slot = slot_of(part)
        _check(slot, name, PARTS[slot], part)
        for option in option_names(part):
            if default(part, option) is MISSING:
                raise UserError(
                    f"The option {option!r} of {part.__name__} has no default, and a part that is "
                    "named is built without one: write option(value, help)."
                )
        PARTS[slot][name] = part
        return part

    return add


def register_recipe(name: str, recipe: Recipe) -> None:
    """Add a method: a recipe of parts, fastadv's own or registered ones.

    Raises ``UserError`` for a name that another recipe has or that ``register`` would refuse, and
    for a part that is not known and an option that none of its parts has.
    """
    _check("method", name, METHODS, recipe)
    for form in (recipe, *map(recipe.of_variant, recipe.variants)):
        check_recipe(name, form)
    METHODS[name] = recipe


def check_recipe(name: str, recipe: Recipe) -> None:
    """Raise ``UserError`` for a part of ``recipe`` that is not known, and for an option that none
    of its parts has."""
    for slot, part in recipe.parts().items():
        if part not in names(slot):
            raise unknown(f"{slot} of the recipe {name!r}:", part, names(slot))
    classes = [PARTS[slot][part] for slot, part in recipe.parts().items() if part != NONE]
    known = all_options(classes)
    for options in (recipe.options, *(each.options for each in recipe.on_data.values())):
        for option in options:
            if option not in known:
                raise unknown(f"option of the recipe {name!r}:", option, known)


def slot_of(part: type[Part]) -> str:
    """The slot that a part class fits. Raises ``UserError`` for a class that is no part."""
    for slot, base in BASES.items():
        if isinstance(part, type) and issubclass(part, base) and part is not base:
            return slot
    bases = ", ".join(base.__name__ for base in BASES.values())
    raise UserError(f"{brief(part)} is no part: derive it from one of {bases}.")


def _check(slot: str, name: str, table: Mapping[str, object], new: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name) or name == NONE:
        raise UserError(
            f"{name!r} cannot be the name of the {slot}: use small letters, digits and hyphens, "
            "such as 'my-method'."
        )
    if name in table and table[name] is not new:
        raise UserError(f"The {slot} {name!r} exists already: choose another name.")
