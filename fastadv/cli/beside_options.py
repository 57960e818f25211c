"""Which options a command was given beside one that does something of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from fastadv.cli.command_help import flags
from fastadv.errors import UserError


def require_alone(
    command: Callable[..., Any], given: Mapping[str, Any], reason: str, *allowed: str
) -> None:
    """Raise ``UserError`` with the ``reason`` if ``command`` was given, in ``given``, an option or
    an argument that is not one of the parameters ``allowed``. One given its usual value counts as
    not given."""
    usual = {name: each.default for name, each in inspect.signature(command).parameters.items()}
    said = flags(command)
    others = [
        said[name]
        for name, value in given.items()
        if name not in allowed and value is not None and value != usual[name]
    ]
    if others:
        raise UserError(f"{reason}: omit {', '.join(others)}.")
