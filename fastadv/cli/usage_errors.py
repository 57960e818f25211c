"""What the command-line library finds wrong, in our words: one sentence with the way out."""

from __future__ import annotations

import re
from difflib import get_close_matches

from fastadv.cli.misspelt import misspelt
from fastadv.cli.no_number import no_number
from fastadv.storage.printable import printable


def sentence_of(error: Exception) -> str:
    """The sentence about a wrong use of the command line."""
    return misspelt(error) or no_number(error) or _missing(error) or _plain(error)


def _missing(error: Exception) -> str | None:
    """About an argument or a required option that is not there."""
    parameter, context = getattr(error, "param", None), getattr(error, "ctx", None)
    if parameter is None or context is None or "Missing" not in type(error).__name__:
        return None
    name = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name.upper()
    meaning = f", {parameter.help}" if getattr(parameter, "help", None) else ""
    return f"`{context.command_path}` needs {name}{meaning}; `{context.command_path} -h` shows how."


def _plain(error: Exception) -> str:
    said: str = getattr(error, "format_message")()  # noqa: B009
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", "fastadv")
    if found := re.match(r"No such command '(.*?)'\.", said, re.DOTALL):
        return _no_command(found[1], context)
    if found := re.match(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", said, re.DOTALL):
        return (
            f"`{command}` takes no {printable(found[1])!r} there; options begin with two dashes, "
            f"and `{command} -h` lists them."
        )
    if found := re.match(r"Option '(.*?)' requires (?:an argument|\d+ arguments)", said):
        return f"{found[1]} needs a value after it."
    if found := re.match(r"Option '(.*?)' does not take a value", said):
        return f"{found[1]} takes no value: write {found[1]} alone, or omit it."
    return said


def _no_command(given: str, context: object) -> str:
    known = list(getattr(getattr(context, "command", None), "commands", {}))
    near = get_close_matches(given, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}."
    return f"Unknown command {printable(given)!r}; {hint}"
