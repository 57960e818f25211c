"""Which settings go with another one, as their roles say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastadv.run.config import required_settings
from fastadv.run.request import roles


def left_out(held: Mapping[str, Any], given: Mapping[str, Any]) -> set[str]:
    """The settings of ``held`` that were for a value which ``given`` replaces, and do not go with
    the new one; both are name -> value, in the settings' own types."""
    known = roles()
    return {
        name
        for name in held.keys() - given.keys()
        for other in known[name].beside
        if other.setting in given
        and other.setting in held
        and not other.fits(held[other.setting], given[other.setting])
    }


def replaced(held: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` over ``held``, without what does not go with it and a run can do without: what is
    ``left_out`` of ``held``, and what was not for its own values."""
    known, result = roles(), {**held, **given}
    gone = left_out(held, given) | {
        name
        for name in held.keys() - given.keys()
        for other in known[name].beside
        if other.values and result.get(other.setting) not in other.values
    }
    for name in gone.difference(required_settings()):
        del result[name]
    return result
