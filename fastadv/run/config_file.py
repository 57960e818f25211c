"""A run's config.toml: the settings as text, and read again."""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastadv.declared import coerce, plain_type
from fastadv.errors import UserError, unknown, warn
from fastadv.run.config import RunConfig
from fastadv.run.request import RunRequest, setting_types
from fastadv.storage import sealed
from fastadv.storage.printable import printable

MOST_BYTES = 1 << 20  # of a config.toml

Places = dict[str, tuple[str, ...]]
"""Setting or option -> the paths that it names."""

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


def places_text(places: Places) -> str:
    """``places`` as the table of that name, the last of a config.toml; "" for none."""
    lines = [f"{k} = [{', '.join(map(_literal, paths))}]" for k, paths in places.items()]
    return "\n".join(["", "[places]", *lines]) + "\n" if lines else ""


def tables(text: str) -> dict[str, Any]:
    """The entries and tables of ``text``, as ``to_toml`` writes it. Raises ``ValueError`` and
    ``RecursionError`` for what is no TOML."""
    found: dict[str, Any] = _whole(tomllib.loads(text))
    return found


def _whole(value: Any) -> Any:
    """``value`` from a TOML file with the characters that TOML cannot hold."""
    if isinstance(value, str):
        return _HELD.sub(lambda found: chr(int(found[1], 16)), value)
    if isinstance(value, dict):
        return {name: _whole(each) for name, each in value.items()}
    return [_whole(each) for each in value] if isinstance(value, list) else value


@dataclass(frozen=True)
class Content:
    """What a file says. ``settings`` are in their own types, ``others`` are the entries above
    ``[options]`` that are no settings, and ``places`` is None where that table is missing."""

    settings: dict[str, Any]
    others: dict[str, Any]
    options: dict[str, Any]
    places: Places | None


def read(content: bytes, path: Path, *, changed: bool = False) -> Content:
    """What ``content`` of the file ``path`` says, checked against its checksum if any: another one
    is an error, or with ``changed`` a warning. Raises ``UserError`` in one sentence."""
    shown = printable(path)
    broken = False
    try:
        text = content.decode("utf-8")
        try:
            sealed.check_text(text)
        except sealed.Broken:
            if not changed:
                raise UserError(
                    f"{shown} is damaged or was changed: its checksum does not match. Restore it, "
                    "or delete its last line to use it as it is."
                ) from None
            broken = True
        found = tables(text)
    except (ValueError, RecursionError, MemoryError) as error:  # no TOML, or nested too deeply
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"Cannot read the configuration {shown}: {printable(str(error))}. Correct it, or "
            "restore it."
        ) from None
    if broken:
        warn(f"{shown} was changed after a run wrote it: its checksum does not match.")
    places = found.pop("places", None)
    options = found.pop("options", {})
    if not isinstance(options, dict):
        raise UserError(f"[options] in {shown} must be a table, not {_shown(options)}.")
    for name, value in [*found.items(), *options.items()]:
        _require_plain(name, value, shown)
    known = setting_types()
    settings = {
        name: _setting(name, value, known[name], shown)
        for name, value in found.items()
        if name in known
    }
    others = {name: value for name, value in found.items() if name not in known}
    return Content(settings, others, options, None if places is None else _places(places))


def of_a_run(content: bytes, path: Path) -> tuple[RunRequest, Places]:
    """What the ``content`` of a run's file ``path`` asks for, and its places as seen from its
    folder. Raises ``UserError`` as ``read`` does, and for an entry that is no setting."""
    found = read(content, path)
    for name in found.others:
        shown = printable(path)
        raise UserError(printable(str(unknown(f"setting in {shown}", name, setting_types()))))
    return RunRequest(**found.settings, options=found.options), found.places or {}


def from_bytes(content: bytes, path: Path) -> RunRequest:
    """What the ``content`` of a run's file ``path`` asks for."""
    return of_a_run(content, path)[0]


def _places(found: Any) -> Places:
    """The entries of the table ``places`` that are lists of paths."""
    lists = found.items() if isinstance(found, dict) else ()
    return {
        name: tuple(paths)
        for name, paths in lists
        if isinstance(paths, list) and all(isinstance(path, str) for path in paths)
    }


def _setting(name: str, value: Any, hint: Any, path: str) -> Any:
    if plain_type(hint) is str and not isinstance(value, str):
        raise UserError(f"{name} in {path} must be a text, not {_shown(value)}.")
    try:
        return coerce(f"{name} in {path}", value, hint)
    except UserError as error:
        raise UserError(printable(str(error))) from None


def _require_plain(name: str, value: Any, path: str) -> None:
    """Raise ``UserError`` for a value that no setting has: a table, a date, lists within lists."""
    entries = value if isinstance(value, list) else [value]
    odd = (Mapping, list, datetime.date, datetime.time)
    if any(isinstance(entry, odd) for entry in entries):
        raise UserError(
            f"{printable(name)} in {path} must be a text, a number, true or false, or a list of "
            f"these, not {_shown(value)}."
        )


def _shown(value: object) -> str:
    return printable(f"{value!r}"[:80])
