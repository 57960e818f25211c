"""Text of strangers (file names, class names, settings) made safe to show in a terminal."""

from __future__ import annotations

import unicodedata

_UNSAFE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories that steer a terminal, hide text or turn its direction, or show nothing."""


def printable(text: object) -> str:
    """``text`` with every control, format and unassigned character written as an escape.

    A file name can hold sequences that clear the screen or set the window's title; here they
    read ``\\x1b[2J``. Line breaks are escaped too: a name must not look like two lines.
    """
    return "".join(_shown(letter) for letter in str(text))


def _shown(letter: str) -> str:
    if letter.isascii() and letter.isprintable():
        return letter
    if unicodedata.category(letter) not in _UNSAFE:
        return letter
    return letter.encode("unicode_escape").decode("ascii")
