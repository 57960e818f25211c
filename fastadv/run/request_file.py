"""``fastadv train --config FILE.toml``: what a run wrote, or a few lines by hand, as a request.

Settings of a run stand at the top level, options of parts and swapped parts there or in
``[options]``. What the command line says comes before the file. A config.toml of a run has every
setting, so it means the same run anew, in a folder of its own.
"""

from __future__ import annotations

import datetime
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastadv.algorithms.options import all_options
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.resolution import choose_parts, known_options
from fastadv.declared import coerce, plain_type
from fastadv.errors import UserError, unknown, warn
from fastadv.models.packaged import names_own_code
from fastadv.run import places
from fastadv.run.config import required_settings
from fastadv.run.config_file import MOST_BYTES, places_in, whole
from fastadv.run.own_schedule import is_own
from fastadv.run.request import RunRequest, as_flag, setting_types
from fastadv.storage import files, sealed, trust
from fastadv.storage.printable import printable

_COMPANIONS: Mapping[str, tuple[str, ...]] = {
    "schedule": ("drops", "drop_factors", "peak"),
    "drops": ("drop_factors",),
    "optimizer": ("momentum", "cycle_momentum", "nesterov"),
    "model": ("width", "depth", "shortcut", "stem", "blocks"),
    "augmentation": ("pad",),
    "amp": ("amp_dtype",),
    "eps": ("eval_alpha",),
    "norm": ("eps", "eval_alpha"),
    "method": ("variant",),
}
"""A setting -> those of a file that are for its value there, and are left out where the command
line has another."""


def with_file(path: str, said: RunRequest) -> RunRequest:
    """``said`` on the command line, with what the file ``path`` says where it is silent.

    Raises ``UserError`` in one sentence for a file that cannot be read, for unknown names, and for
    a file of unknown origin that names code to run.
    """
    place = Path(path)
    content = _content(place)
    tables = _tables(content, place)
    of_a_run = tables.pop("places", None) is not None
    settings, options = _divided(tables, printable(place))
    if of_a_run:
        settings, options = _found_again(settings, options, content, place)
    complete = sealed.is_sealed(content) or all(name in settings for name in required_settings())
    given = {name: getattr(said, name) for name in setting_types()}
    given = {name: value for name, value in given.items() if value is not None}
    if complete:
        settings.pop("out", None)
    for name, is_code in (("model", names_own_code), ("schedule", is_own)):
        value = settings.get(name)
        if isinstance(value, str) and name not in given and is_code(value):
            _require_trusted(place, content, name, value)
    for name in _replaced(settings, given, complete=complete):
        settings.pop(name, None)
    options = _that_fit(options, settings, said, printable(place))
    settings = {name: value for name, value in settings.items() if name not in given}
    options = {name: value for name, value in options.items() if name not in said.options}
    return replace(
        said,
        **settings,
        options={**options, **said.options},
        of_file=frozenset([*settings, *options]),
    )


def _found_again(
    settings: dict[str, Any], options: dict[str, Any], content: bytes, path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and options in the ``content`` of a run's file, with paths that lead somewhere
    though it has moved."""
    named = {name: value for name, value in settings.items() if name in places.SETTINGS}
    request = RunRequest(**named, options=options)
    found = places.found_again(request, places_in(content), path.parent, {})
    return settings | {name: getattr(found, name) for name in named}, dict(found.options)


def _require_trusted(path: Path, content: bytes, name: str, value: str) -> None:
    try:
        trust.require(path.parent, content, f"{name} {value}")
    except UserError:
        raise UserError(
            f"{printable(path)} names code to run, {name} {printable(value)}: add --trust-code if "
            "you know that module and who wrote the file, or name it as "
            f"--{name}."
        ) from None


def _content(path: Path) -> bytes:
    shown = printable(path)
    try:
        if path.is_dir() and (path / "config.toml").exists():
            raise UserError(f"{shown} is a folder: write --config {shown}/config.toml.")
        return files.read(path, MOST_BYTES)
    except FileNotFoundError:
        raise UserError(f"There is no file {shown} for --config.") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or "no name of a file"
        raise UserError(f"Cannot read the configuration {shown}: {reason}.") from None


def _tables(content: bytes, path: Path) -> dict[str, Any]:
    shown = printable(path)
    try:
        text = content.decode("utf-8")
        found = whole(tomllib.loads(text))
    except (ValueError, RecursionError, MemoryError) as error:  # no TOML, or nested too deeply
        raise UserError(
            f"Cannot read the configuration {shown}: {printable(str(error))}."
        ) from None
    try:
        sealed.check_text(text)
    except sealed.Broken:
        warn(f"{shown} was changed after a run wrote it: its checksum does not match.")
    return found


def _divided(found: dict[str, Any], path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of the run, and the slots and options of parts: name -> value."""
    known, of_parts = setting_types(), _of_parts()
    options = found.pop("options", {})
    if not isinstance(options, Mapping):
        raise UserError(f"[options] in {path} must be a table, not {_shown(options)}.")
    settings: dict[str, Any] = {}
    chosen = dict(options)
    for name, value in found.items():
        if name in known:
            settings[name] = _setting(name, value, known[name], path)
        elif name not in of_parts:
            raise _unknown(name, [*known, *of_parts], path)
        elif name in options:
            raise UserError(f"{printable(name)} is said twice in {path}; omit one.")
        else:
            chosen[name] = value
    for name, value in chosen.items():
        if name not in of_parts and name in known:
            raise UserError(
                f"{name} in {path} is a setting of the run: write it above the line [options]."
            )
        if name not in of_parts:
            raise _unknown(name, of_parts, path)
        _require_plain(name, value, path)
    return settings, chosen


def _of_parts() -> dict[str, Any]:
    """Every slot and every option of a part."""
    classes = [part for parts in PARTS.values() for part in parts.values()]
    return {**dict.fromkeys(PARTS, str), **all_options(classes)}


def _setting(name: str, value: Any, hint: Any, path: str) -> Any:
    _require_plain(name, value, path)
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


def _unknown(name: str, known: Collection[str], path: str) -> UserError:
    few = ("method", "data", "eps", "epochs", "lr")
    return UserError(printable(str(unknown(f"setting in {path}:", name, known, few))))


def _shown(value: object) -> str:
    return printable(f"{value!r}"[:80])


def _replaced(settings: Mapping[str, Any], given: Mapping[str, Any], *, complete: bool) -> set[str]:
    """The settings of the file that were for another one, which the command line replaces."""
    types = setting_types()
    left_out: set[str] = set()
    for name, companions in _COMPANIONS.items():
        if name not in given or name not in settings:
            continue
        if coerce(as_flag(name), given[name], types[name]) != settings[name]:
            left_out.update(companions)
            # A run's file has every setting, so this rate is probably the preset's.
            if name == "optimizer" and complete:
                left_out.add("lr")
    return left_out


def _that_fit(
    options: dict[str, Any], settings: Mapping[str, Any], said: RunRequest, path: str
) -> dict[str, Any]:
    """``options`` without those of parts that the command line replaces by others."""
    method = settings.get("method")
    if method is not None and said.method is not None and said.method != method:
        lost = sorted(options)
        if lost:
            warn(
                f"{path} is for method {printable(str(method))}: with --method "
                f"{printable(said.method)} its {_list(lost)} {_are(lost)} omitted."
            )
        return {}
    swapped = [slot for slot in PARTS if slot in said.options]
    name = said.method or method
    if not swapped or name not in METHODS:
        return options
    slots = {slot: options[slot] for slot in PARTS if slot in options}
    slots |= {slot: said.options[slot] for slot in swapped}
    row = METHODS[name]
    variant = said.variant or settings.get("variant")
    if variant is not None:
        row = row.of_variant(variant)
    known = known_options(choose_parts(row, slots))
    return {name: value for name, value in options.items() if name in PARTS or name in known}


def _list(names: Collection[str]) -> str:
    few = ", ".join(list(names)[:4])
    return few if len(names) <= 4 else f"{few} and {len(names) - 4} more"


def _are(names: Collection[str]) -> str:
    return "is" if len(names) == 1 else "are"
