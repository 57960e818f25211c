"""A run's config.toml: the settings as text, and read again."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadv.declared import coerce, plain_type
from fastadv.errors import UserError, unknown
from fastadv.run.config import RunConfig
from fastadv.run.request import RunRequest, setting_types
from fastadv.storage import sealed
from fastadv.storage.printable import printable

MOST_BYTES = 1 << 20  # of a config.toml

# A byte of a file name that is no UTF-8 is a lone surrogate in Python, which TOML has not. It is
# written as a character that no name holds, and four digits; and so is that character.
_HELD_BACK = re.compile("[\0\ud800-\udfff]")
_HELD = re.compile("\0([0-9a-f]{4})")


def to_toml(run: RunConfig | RunRequest) -> str:
    """The settings and options of ``run`` as TOML; what is None is left out."""
    settings = {name: getattr(run, name) for name in setting_types()}
    lines = [f"{name} = {_literal(value)}" for name, value in settings.items() if value is not None]
    lines += ["", "[options]"]
    lines += [f"{k} = {_literal(v)}" for k, v in run.options.items() if v is not None]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    text = _HELD_BACK.sub(lambda found: f"\0{ord(found[0]):04x}", str(value))
    text = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text) + '"'


def places_text(places: Mapping[str, tuple[str, ...]]) -> str:
    """``places`` as the table of that name, the last of a config.toml; "" for none."""
    lines = [f"{k} = [{', '.join(map(_literal, paths))}]" for k, paths in places.items()]
    return "\n".join(["", "[places]", *lines]) + "\n" if lines else ""


def places_in(content: bytes) -> dict[str, tuple[str, ...]]:
    """The table ``places`` in the ``content`` of a file that ``from_bytes`` has read."""
    found = whole(tomllib.loads(content.decode("utf-8"))).get("places", {})
    lists = found.items() if isinstance(found, dict) else ()
    return {
        name: tuple(paths)
        for name, paths in lists
        if isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    }


def whole(value: Any) -> Any:
    """``value`` from a TOML file with the characters that TOML cannot hold."""
    if isinstance(value, str):
        return _HELD.sub(lambda found: chr(int(found[1], 16)), value)
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    return [whole(each) for each in value] if isinstance(value, list) else value


def from_bytes(content: bytes, path: Path) -> RunRequest:
    """What ``content`` of the file ``path`` asks for, checked against its checksum if any."""
    shown = printable(path)
    try:
        text = content.decode("utf-8")
        sealed.check_text(text)
        found = whole(tomllib.loads(text))
    except sealed.Broken:
        raise UserError(
            f"{shown} is damaged or was changed: its checksum does not match. Restore it, or "
            "delete its last line to use it as it is."
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:  # no TOML, or nested too deeply
        raise UserError(
            f"Cannot read the configuration {shown}: {printable(str(error))}. Correct it, or "
            "restore it."
        ) from None
    try:
        return _from_tables(found, shown)
    except UserError as error:
        raise UserError(printable(str(error))) from None
    except (TypeError, ValueError, OverflowError, AttributeError, RecursionError) as error:
        raise UserError(
            f"A setting in {shown} has a value of the wrong type: {printable(str(error))}."
        ) from None


def _from_tables(found: dict[str, Any], path: str) -> RunRequest:
    found.pop("places", None)
    options = found.pop("options", {})
    if not isinstance(options, Mapping):
        raise UserError(f"The options in {path} must be a table, not {options!r}.")
    known = setting_types()
    for name in found:
        if name not in known:
            raise unknown(f"setting in {path}", name, known)
        if plain_type(known[name]) is str and not isinstance(found[name], str):
            raise UserError(f"{name} in {path} must be a text, not {found[name]!r}.")
    values = {name: coerce(name, value, known[name]) for name, value in found.items()}
    return RunRequest(**values, options=options)
