"""The console on which commands and runs print."""

from __future__ import annotations

import os
import sys
from typing import Any

import rich.console
from rich.text import Text

from fastadv.printing.layout import UNLIMITED, pieces

SAY_EVERY = 60.0  # seconds between lines about something long where there is no terminal
HANG = 2  # columns by which the further lines of a sentence are moved in


class Terminal(rich.console.Console):
    """Text is broken between words at the width of the terminal, of ``COLUMNS`` or of ``width=``;
    where there is none, lines stay whole. Neither a closed pipe (``| head``) nor a file on a full
    disk ends the run."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "soft_wrap": True} | options)
        self._is_wide = not (options.get("width") or os.environ.get("COLUMNS"))

    @property
    def columns(self) -> int:
        """The columns of a line."""
        return UNLIMITED if self._is_wide and not self.is_terminal else self.width

    def print(self, *objects: Any, **options: Any) -> None:
        if len(objects) == 1 and isinstance(objects[0], (str, Text)):
            text = objects[0]
            text = self.render_str(text, highlight=False) if isinstance(text, str) else text
            objects = (self._broken(text),)
        else:  # a table fits itself
            options.setdefault("soft_wrap", False)
        try:
            super().print(*objects, **options)
        except OSError:
            self.on_broken_pipe()

    def _broken(self, text: Text) -> Text:
        lines = []
        for paragraph in text.split("\n", allow_blank=True):
            plain = paragraph.plain
            hang = len(plain) - len(plain.lstrip()) + HANG
            spans = pieces(plain, self.columns, hang)
            lines += [
                Text(" " * hang if begin else "") + paragraph[begin:end] for begin, end in spans
            ]
        return Text("\n", end=text.end).join(lines)

    def on_broken_pipe(self) -> None:
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
