"""``fastadv train --config FILE.toml``: what a run wrote, or a few lines by hand, as a request.

Settings of a run stand at the top level, options of parts and swapped parts there or in
``[options]``. What the command line says comes before the file. A config.toml of a run has every
setting, so it means the same run anew, in a folder of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastadv.algorithms.options import all_options
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.recipes.table import METHODS
from fastadv.algorithms.resolution import choose_parts, known_options
from fastadv.errors import UserError, unknown, warn
from fastadv.models.packaged import names_own_code
from fastadv.run import places
from fastadv.run.companions import left_out
from fastadv.run.config import required_settings
from fastadv.run.config_file import MOST_BYTES, Content, Places, read
from fastadv.run.own_schedule import is_own
from fastadv.run.request import RunRequest, setting_types
from fastadv.run.resolve import typed
from fastadv.storage import files, sealed, trust
from fastadv.storage.printable import printable


def with_file(path: str, said: RunRequest) -> RunRequest:
    """``said`` on the command line, with what the file ``path`` says where it is silent.

    Raises ``UserError`` in one sentence for a file that cannot be read, for unknown names, and for
    a file of unknown origin that names code to run.
    """
    place = Path(path)
    content = _content(place)
    found = read(content, place, changed=True)
    settings, options = found.settings, _options(found, printable(place))
    if found.places is not None:
        settings, options = _found_again(settings, options, found.places, place)
    complete = sealed.is_sealed(content) or all(name in settings for name in required_settings())
    given = typed(said)
    if complete:
        settings.pop("out", None)
    for name, is_code in (("model", names_own_code), ("schedule", is_own)):
        value = settings.get(name)
        if isinstance(value, str) and name not in given and is_code(value):
            _require_trusted(place, content, name, value)
    options = _that_fit(options, settings, said, printable(place))
    for name in _replaced(settings, given, complete=complete):
        settings.pop(name, None)
    options = {name: value for name, value in options.items() if name not in said.options}
    return replace(
        said,
        **settings,
        options={**options, **said.options},
        of_file=frozenset([*settings, *options]),
    )


def _found_again(
    settings: dict[str, Any], options: dict[str, Any], beside: Places, path: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings and options of a run's file, with paths that lead somewhere though it has
    moved."""
    named = {name: value for name, value in settings.items() if name in places.SETTINGS}
    request = RunRequest(**named, options=options)
    found = places.found_again(request, beside, path.parent, {})
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


def _options(found: Content, path: str) -> dict[str, Any]:
    """The slots and options of parts, in ``[options]`` or above it: name -> value. Raises
    ``UserError`` for a name that is none."""
    known, of_parts = setting_types(), _of_parts()
    for name in found.others:
        if name not in of_parts:
            raise _unknown(name, [*known, *of_parts], path)
        if name in found.options:
            raise UserError(f"{printable(name)} is said twice in {path}; omit one.")
    for name in found.options:
        if name not in of_parts and name in known:
            raise UserError(
                f"{name} in {path} is a setting of the run: write it above the line [options]."
            )
        if name not in of_parts:
            raise _unknown(name, of_parts, path)
    return {**found.options, **found.others}


def _of_parts() -> dict[str, Any]:
    """Every slot and every option of a part."""
    classes = [part for parts in PARTS.values() for part in parts.values()]
    return {**dict.fromkeys(PARTS, str), **all_options(classes)}


def _unknown(name: str, known: Collection[str], path: str) -> UserError:
    few = ("method", "data", "eps", "epochs", "lr")
    return UserError(printable(str(unknown(f"setting in {path}:", name, known, few))))


def _replaced(settings: Mapping[str, Any], given: Mapping[str, Any], *, complete: bool) -> set[str]:
    """The settings of the file that the command line says, and those that were for one of these."""
    held = typed(RunRequest(**settings))
    gone = settings.keys() & given.keys() | left_out(held, given)
    other = "optimizer" in given and given["optimizer"] != held.get("optimizer", "sgd")
    # A run's file has every setting, so this rate is probably the preset's.
    return gone | {"lr"} if complete and other else gone


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
