"""What the tab key completes: options of the commands, names of methods, attacks and so on.

``train`` builds its options with torch, which a completion cannot wait for: they are kept in
``completion.json``. ``python -m fastadv.cli.train_help`` writes it anew; a test
compares it.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from fastadv.errors import UserError

STORED = Path(__file__).with_name("completion.json")
SHELLS = ("bash", "zsh", "fish", "powershell", "pwsh")
VARIABLE = "_FASTADV_COMPLETE"  # set by the shell that asks


def asked_for() -> bool:
    """True if a shell asks what a line may go on with."""
    return VARIABLE in os.environ


def require_known_shell() -> None:
    """Raise ``UserError`` where the shell that called is none of those that are completed."""
    import shellingham  # typer requires it

    try:
        name = shellingham.detect_shell()[0]
    except (shellingham.ShellDetectionFailure, RuntimeError, OSError):
        return
    if name not in SHELLS:
        raise UserError(f"The shell {name} has no completion; call it from {', '.join(SHELLS)}.")


@cache
def _stored() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(STORED.read_text(encoding="utf-8"))
    return found


def of(kind: str) -> Callable[[str], list[str]]:
    """Completes one of the names called ``kind`` in ``completion.json``, or the last of several
    with commas between them."""

    def complete(incomplete: str) -> list[str]:
        names = _stored()["names"].get(kind, ())
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in names if name.startswith(last)]

    return complete


def parameters(command: str) -> list[inspect.Parameter]:
    """The options of ``command`` as they are stored."""
    found = []
    for flags, takes_value, kind, text in _stored()["commands"][command]:
        option = typer.Option(*flags, help=text, autocompletion=of(kind) if kind else None)
        hint: Any = str if takes_value else bool
        name = flags[0].partition("/")[0].strip("-").replace("-", "_")
        found.append(
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[hint | None, option],
            )
        )
    return found
