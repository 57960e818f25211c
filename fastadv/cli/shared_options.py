"""Options that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

from fastadv.cli import completion


def _in_small_letters(attacks: str) -> str:
    """The names as they are stored: PGD-20 is pgd-20, and not evaluated again."""
    return attacks.lower()


Attacks = Annotated[
    str,
    typer.Option(
        "--attacks",
        help="clean, pgd-20, quick, autoattack, ... with commas; all: fastadv attacks",
        callback=_in_small_letters,
        autocompletion=completion.of("attacks"),
    ),
]

On = Annotated[
    str,
    typer.Option(
        "--on",
        help="images: test, val, or train (not augmented, with the labels trained on)",
        autocompletion=completion.of("--on"),
    ),
]

SearchDtype = Annotated[
    str,
    typer.Option(
        "--search-dtype",
        help="float32, or bf16 (for hardware that has it), confirmed in float32",
        autocompletion=completion.of("--search-dtype"),
    ),
]

Mode = Annotated[
    str,
    typer.Option(
        "--mode",
        help="execution: auto, eager, compiled (long ones on a CPU), captured",
        autocompletion=completion.of("--mode"),
    ),
]

Data = Annotated[
    str | None, typer.Option("--data", help="where the runs' data are now, or other data")
]

DataRoot = Annotated[
    str | None, typer.Option("--data-root", help="where the folder of the data sets is now")
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
