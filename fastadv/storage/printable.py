"""Names from files of unknown origin, made safe for a terminal."""

from __future__ import annotations

import os

_LONGEST = 300


def printable(text: str | os.PathLike[str]) -> str:
    """``text`` on one line, with every control or invisible character written as its escape.

    A file name may hold the codes that move a cursor, recolour or retitle a terminal, or turn the
    direction of writing. The middle of a long text is cut out.
    """
    shown = "".join(c if c.isprintable() else _escaped(c) for c in os.fspath(text))
    if len(shown) > _LONGEST:
        return f"{shown[: _LONGEST // 2]}...{shown[-_LONGEST // 2 :]}"
    return shown


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def safe_sentence(text: object) -> str:
    """``text`` of a message, whole and with its line breaks, safe for a terminal."""
    return "".join(c if c == "\n" or c.isprintable() else _escaped(c) for c in str(text))
