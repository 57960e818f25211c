"""Lines of text for a terminal: broken between words only, to its width."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

# Where standard output is no terminal, lines are not cut: another program reads them.
UNLIMITED = 10_000
PAGE = 80  # columns of a page without a terminal: it may be read in a pager, which is one
WIDEST = 100  # columns of a page; longer lines are hard to read

_GAP = re.compile(r"(?<=\S) +")


def columns() -> int:
    """The columns of the terminal (or of ``COLUMNS``); ``UNLIMITED`` where there is none."""
    return shutil.get_terminal_size((UNLIMITED, 0)).columns


def page_columns() -> int:
    """The columns of a text to read, such as a help or an explanation."""
    return min(shutil.get_terminal_size((PAGE, 0)).columns, WIDEST)


def filled(text: str, width: int | None = None, hang: str = "") -> str:
    """``text`` in lines of at most ``width`` columns (None: ``columns()``), each paragraph alone.

    Lines are broken between words. A longer word, such as a path, stays whole, so that it can be
    copied. Two spaces stand between fields (``loss 0.29  lr 0.01``), which are not broken where
    they fit on a line. ``hang`` begins every line of a paragraph but the first.
    """
    width = columns() if width is None else width
    return "\n".join(
        ("\n" + hang).join(each[a:b] for a, b in pieces(each, width, len(hang)))
        for each in text.split("\n")
    )


def pieces(text: str, width: int, hang: int) -> Iterator[tuple[int, int]]:
    """Where each line of the paragraph ``text`` begins and ends; all but the first have only
    ``width - hang`` columns. Spaces between two lines are in neither."""
    begin, room = 0, width
    while len(text.rstrip()) - begin > room:
        gaps = [gap.span() for gap in _GAP.finditer(text, begin)]
        gaps = [gap for gap in gaps if gap[1] < len(text)]
        fit = [gap for gap in gaps if gap[0] - begin <= room]
        if not gaps:
            break
        end, after = _whole_field(text, fit, width - hang) or (fit[-1] if fit else gaps[0])
        yield begin, end
        begin, room = after, max(1, width - hang)
    yield begin, len(text.rstrip()) if begin else len(text)


def _whole_field(text: str, gaps: list[tuple[int, int]], room: int) -> tuple[int, int] | None:
    """The last of ``gaps`` between two fields, if the field behind it fits into ``room``."""
    for end, after in reversed(gaps):
        if after - end > 1:
            field = re.split(r"(?<=\S)  +", text[after:], maxsplit=1)[0]
            return (end, after) if len(field.rstrip()) <= room else None
    return None
