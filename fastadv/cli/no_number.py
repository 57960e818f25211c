"""The sentence about a word that was given where an option takes a number."""

from __future__ import annotations

_KINDS = {"int": "a whole number", "float": "a number"}


def no_number(error: Exception) -> str | None:
    """The sentence for a value that is no number; None for any other error of the command line.

    Newer versions of typer convert values by a library whose sentence speaks of strings and
    parsing, and does not show the value. The sentence of older ones shows it, and is left."""
    details = getattr(error.__cause__, "errors", None)
    options = getattr(getattr(error, "param", None), "opts", None)
    if details is None or not options:
        return None
    first = details()[0]
    if str(first["type"]).startswith("string"):
        return f"{options[0]} takes text in UTF-8, and what follows it is none."
    kind = _KINDS.get(str(first["type"]).partition("_")[0])
    return f"{options[0]} takes {kind}, not {first['input']!r}." if kind else None
