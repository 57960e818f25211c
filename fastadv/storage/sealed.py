"""Text files with a checksum inside, which stay valid TOML, JSON and JSON lines."""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

_COMMENT = "# checksum "
_KEY = "checksum"
_LINE = re.compile(r', "checksum": "([0-9a-f]{16})"\}')
_MOST_LINE = 1 << 16  # characters of one line of JSON


class Broken(Exception):
    """The text is not what was written."""


def seal_text(text: str) -> str:
    """``text`` (whole lines) and a comment line with its checksum."""
    return f"{text}{_COMMENT}{_of(text)}\n"


def is_sealed(content: bytes) -> bool:
    """True if ``content`` is a text that ``seal_text`` wrote, changed since or not."""
    return b"\n" + _COMMENT.encode() in content


def check_text(text: str) -> None:
    """Raise ``Broken`` if ``text`` ends in a checksum that does not match.

    A text without a checksum passes: the user deleted that line to edit the file by hand.
    """
    content, mark, rest = text.rpartition("\n" + _COMMENT)
    if mark and rest != _of(content + "\n") + "\n":
        raise Broken


def seal_value(value: dict[str, Any]) -> str:
    """``value`` as indented JSON with its checksum as the last key."""
    return json.dumps(value | {_KEY: _of(json.dumps(value))}, indent=2) + "\n"


def open_value(text: str) -> dict[str, Any]:
    """What ``seal_value`` wrote; raises ``Broken``."""
    try:
        value = json.loads(text)
        found = value.pop(_KEY)
        whole = _of(json.dumps(value)) == found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise Broken from None
    if not whole:
        raise Broken
    return dict(value)


def seal_line(value: dict[str, Any], before: str) -> str:
    """``value`` as a line of JSON. Its checksum also covers ``before``, the previous line."""
    text = json.dumps(value)
    return f'{text[:-1]}, "{_KEY}": "{_of(before + text)}"}}\n'


def open_lines(text: str) -> list[dict[str, Any]]:
    """What ``seal_line`` wrote, without the checksums; raises ``Broken``.

    A last line without a line end is left out: a crash truncated it.
    """
    *lines, rest = text.split("\n")
    if _LINE.search(rest[:-1][-40:]):  # a whole line, and its end is another character
        raise Broken
    found, before = [], ""
    for line in lines:
        mark = _LINE.search(line[-40:])
        if mark is None or len(line) > _MOST_LINE:
            raise Broken
        content = line[: len(line) - len(mark[0])] + "}"
        if not line.endswith(mark[0]) or mark[1] != _of(before + content):
            raise Broken
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            raise Broken from None
        if not isinstance(value, dict) or type(value.get("epoch")) is not int:
            raise Broken
        found.append(value)
        before = line + "\n"
    return found


def _of(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
