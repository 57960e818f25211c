"""A mistyped option of ``fastadv train`` is told at once: its options are built with torch, which
takes seconds, but what they are called is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer

from fastadv.algorithms import plugins
from fastadv.cli import completion
from fastadv.cli.with_options import with_options


def require_known_options(words: Sequence[str]) -> None:
    """Raise what the command-line library raises for the command line ``words`` of ``train``, where
    the stored names of its options show that it is wrong: an option that there is not, or one
    without its value. An installed plugin may have others, which only the options themselves
    show."""
    if plugins.are_installed():
        return
    app = typer.Typer(
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_group)
    app.command("train")(with_options(_nothing, completion.parameters("train")))
    app(args=list(words), prog_name="fastadv", standalone_mode=False)


def _group() -> None:
    """Makes ``train`` a command of its name."""


def _nothing(given: dict[str, Any]) -> None:
    """The command itself is called elsewhere."""
