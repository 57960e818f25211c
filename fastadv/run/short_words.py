"""Texts and times that must not take more than their columns."""

from __future__ import annotations

import math
import textwrap
from typing import Any

import rich.console
from rich.text import Text


def end_of(text: str, width: int) -> str:
    """``text``, or as much of its end as there is room for."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]


def clock(seconds: float | None) -> str:
    """``seconds`` as m:ss, or h:mm:ss; "" for None or what is no number."""
    if seconds is None or math.isnan(seconds):
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_words(out: rich.console.Console, text: str) -> None:
    """Print ``text``, with rich's markup, broken between words alone: rich would also break a word
    or a path that is longer than a line, and a terminal breaks anywhere."""
    styled = Text.from_markup(text)
    shape: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    shape |= {"replace_whitespace": False, "expand_tabs": False}
    place, starts = 0, []
    for part in textwrap.wrap(styled.plain, out.width, **shape):
        place = styled.plain.index(part, place)
        starts.append(place)
    for line in styled.divide(starts[1:]):
        line.rstrip()
        out.print(line, soft_wrap=True)
