"""Options of parts: which there are and of which type (``declared.py`` says what they may be)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from fastadv.algorithms.contract import Part, option_names
from fastadv.declared import declared


def option_types(part: type[Part]) -> dict[str, Any]:
    """The options of a part class: name -> type, with its range."""
    hints = declared(part)
    return {name: hints[name] for name in option_names(part)}


def default(part: type[Part], name: str) -> Any:
    """The default of one option."""
    return next(field.default for field in dataclasses.fields(part) if field.name == name)


def all_options(parts: Iterable[type[Part]]) -> dict[str, Any]:
    """The options of many part classes together: name -> type."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, hint in option_types(part).items():
            found.setdefault(name, hint)
    return found
