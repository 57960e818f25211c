"""The options of parts: their names, types and defaults (``declared.py`` checks values)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from fastadv.algorithms.contract import Part, option_names
from fastadv.declared import declared


def option_types(part: type[Part]) -> dict[str, Any]:
    """The options of a part class: name -> type with its range."""
    hints = declared(part)
    return {name: hints[name] for name in option_names(part)}


def default(part: type[Part], name: str) -> Any:
    """The default of the option ``name`` of a part class."""
    return next(field.default for field in dataclasses.fields(part) if field.name == name)


def all_options(parts: Iterable[type[Part]]) -> dict[str, Any]:
    """The options of several part classes together: name -> type; the first class that has a name
    decides its type."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, hint in option_types(part).items():
            found.setdefault(name, hint)
    return found
