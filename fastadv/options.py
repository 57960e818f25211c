"""Options of parts: which there are, of which type, and how a text becomes one."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Iterable
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from fastadv.contract import Part
from fastadv.errors import UserError, unknown
from fastadv.threat import parse_number


def option_types(part: type[Part]) -> dict[str, Any]:
    """The options of a part class: name -> type."""
    hints = get_type_hints(part)
    return {field.name: hints[field.name] for field in dataclasses.fields(part) if field.init}


def default(part: type[Part], name: str) -> Any:
    """The default of one option."""
    return next(field.default for field in dataclasses.fields(part) if field.name == name)


def plain_type(hint: Any) -> Any:
    """``hint`` without its None."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def coerce(name: str, value: Any, hint: Any) -> Any:
    """``value`` as the option's type; texts such as "8/255", "true" and "10" are read.

    Raises ``UserError`` in one sentence when it does not fit.
    """
    kind = plain_type(hint)
    if value is None and kind is not hint:
        return None
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise unknown(f"{name}", value, get_args(kind))
        return value
    if kind is bool:
        return _boolean(name, value)
    if kind is int:
        number = parse_number(value, name)
        if number != int(number):
            raise UserError(f"{name} must be a whole number, not {value}.")
        return int(number)
    if kind is float:
        return parse_number(value, name)
    if get_origin(kind) is tuple:
        return _several(name, value, get_args(kind))
    return value


def _boolean(name: str, value: Any) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if isinstance(value, bool):
        return value
    if str(value).lower() not in words:
        raise UserError(f"{name} must be true or false, not {value!r}.")
    return words[str(value).lower()]


def _several(name: str, value: Any, kinds: tuple[Any, ...]) -> tuple[Any, ...]:
    """A tuple from a sequence, one value, or a text such as "3,4"."""
    if isinstance(value, str):
        value = [entry.strip() for entry in value.split(",")]
    entries = list(value) if isinstance(value, Iterable) else [value]
    if kinds[-1] is ...:
        return tuple(_entry(name, entry, kinds[0]) for entry in entries)
    if len(entries) != len(kinds):
        raise UserError(f"{name} takes {len(kinds)} values such as 0,1.5, not {len(entries)}.")
    return tuple(_entry(name, entry, kind) for entry, kind in zip(entries, kinds, strict=True))


def _entry(name: str, value: Any, kind: Any) -> Any:
    return str(value) if kind is str else coerce(name, value, kind)


def all_options(parts: Iterable[type[Part]]) -> dict[str, Any]:
    """The options of many part classes together: name -> type without None."""
    found: dict[str, Any] = {}
    for part in parts:
        for name, hint in option_types(part).items():
            found.setdefault(name, plain_type(hint))
    return found
