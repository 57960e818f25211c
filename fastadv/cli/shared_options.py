"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Attacks = Annotated[
    str,
    typer.Option(
        "--attacks", help="clean, pgd-20, quick, autoattack, ... with commas; all: fastadv attacks"
    ),
]

TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-code", help="run the module:callable that run folders from elsewhere name"
    ),
]

# Taken out of the words by ``_load_plugins``; declared for the help of each command.
Plugin = Annotated[
    list[str] | None,
    typer.Option("--plugin", metavar="FILE", help="run this Python file with methods of your own"),
]
