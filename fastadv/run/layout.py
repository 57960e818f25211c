"""Lines of text for a terminal: broken between words only, to its width."""

from __future__ import annotations

import shutil
import textwrap

# Where standard output is no terminal, lines are not cut: another program reads them.
UNLIMITED = 10_000


def columns() -> int:
    """The columns of the terminal (or of ``COLUMNS``); ``UNLIMITED`` where there is none."""
    return shutil.get_terminal_size((UNLIMITED, 0)).columns


def filled(text: str, width: int | None = None, indent: str = "", hang: str | None = None) -> str:
    """``text`` in lines of at most ``width`` columns (None: ``columns()``), each paragraph alone.

    Lines are broken between words. A longer word, such as a path, has a line of its own and stays
    whole, so that it can be copied. Two spaces stand between fields (``loss 0.29  lr 0.01``): then
    lines are broken between these where they fit. ``indent`` begins the first line of a
    paragraph, ``hang`` the others (None: as the first).
    """
    width = columns() if width is None else width
    hang = indent if hang is None else hang
    return "\n".join(_paragraph(each, width, indent, hang) for each in text.split("\n"))


def _paragraph(text: str, width: int, indent: str, hang: str) -> str:
    if len(indent) + len(text) <= width:
        return (indent + text).rstrip()
    lines: list[str] = []
    line = ""
    for field in text.split("  "):
        start = hang if lines or line else indent
        joined = f"{line}  {field}" if line else start + field
        if len(joined) <= width:
            line = joined
            continue
        if line.strip():
            lines.append(line.rstrip())
        start = hang if lines else indent
        *whole, line = textwrap.wrap(
            field.strip(),
            width,
            initial_indent=start,
            subsequent_indent=hang,
            break_long_words=False,
            break_on_hyphens=False,
        ) or [""]
        lines += whole
    return "\n".join([*lines, line.rstrip()])
