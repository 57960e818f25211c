"""Whether a command line asks for help, and the help of ``fastadv train`` that it asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_HELP = frozenset({"-h", "--help"})
_ALL = "--help-all"


def asks_for_help(words: Sequence[str]) -> bool:
    """True if one of ``words`` before a ``--`` asks for help."""
    options = words[: words.index("--")] if "--" in words else words
    return not _HELP.isdisjoint(options) or (options[:1] == ["train"] and _ALL in options)


def train_page(words: Sequence[str]) -> str:
    """The common options; all with ``--help-all``; with ``--method`` those of its parts. Raises
    ``UserError`` for a method or a variant that is none."""
    method, variant = _value(words, "--method"), _value(words, "--variant")
    if method is not None or variant is not None or _ALL in words:
        from fastadv.cli.train_help import full

        return full(method, variant)
    # Not built but read: the options of the parts need torch (``train_help.py`` writes the file).
    return Path(__file__).with_name("train_help.txt").read_text(encoding="utf-8")


def _value(words: Sequence[str], flag: str) -> str | None:
    """What ``words`` give to the option ``flag``."""
    for word, after in zip(words, [*words[1:], ""], strict=True):
        name, given, value = word.partition("=")
        if name == flag:
            return value if given else after
    return None
