"""Options of ``fastadv train`` that belong to one invocation and are no settings of the run."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastadv.cli.help_screen import Row
from fastadv.errors import UserError
from fastadv.storage.printable import printable

if TYPE_CHECKING:
    from fastadv.run.request import RunRequest

OPTIONS: Mapping[str, tuple[Any, Row]] = {
    "config": (str, Row("--config FILE", "a run's config.toml, or lines of your own; options win")),
    "name": (str, Row("--name NAME", "the run folder is runs/NAME")),
    "resume": (
        str,
        Row("--resume FOLDER", "go on with the run in it; auto: begin it or go on"),
    ),
    "max_time": (
        str,
        Row("--max-time TIME", "save and stop in time: 23:30:00, 90m, 1.5h"),
    ),
    "dry_run": (bool, Row("--dry-run", "show settings, cost, time and memory; write nothing")),
    "trust_code": (
        bool,
        Row("--trust-code", "run the module:callable that a --resume or --config names"),
    ),
}
"""Name -> type of the option and its row of help."""

PLUGIN = Row("--plugin FILE", "run this Python file with methods of your own")
COMMON = ("config", "name", "resume", "max_time", "dry_run")  # on the short screen


def rows(names: Mapping[str, Any] | tuple[str, ...] = OPTIONS) -> list[Row]:
    """The rows of help of the options called ``names``, and of --plugin."""
    return [PLUGIN, *(OPTIONS[name][1] for name in names)]


def parameters() -> list[inspect.Parameter]:
    """The options for typer; what is not given is None."""
    return [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[kind | None, typer.Option(row.flag.split()[0], help=row.meaning)],
        )
        for name, (kind, row) in OPTIONS.items()
    ]


def with_invocation(said: RunRequest, config: str | None, name: str | None) -> RunRequest:
    """``said`` with what the file ``config`` says beside it, in the folder runs/``name``."""
    if config is not None:
        from fastadv.run.request_file import with_file

        said = with_file(config, said)
    if name is None:
        return said
    if said.out is not None and "out" not in said.of_file:
        raise UserError("--name NAME stands for --out runs/NAME: omit one of them.")
    if not name.strip() or name in (".", "..") or not name.isprintable() or "/" in name:
        raise UserError(
            f"--name is the name of one folder, not {printable(name)!r}; for a path take --out."
        )
    return replace(said, out=str(Path("runs") / name), of_file=said.of_file - {"out"})
