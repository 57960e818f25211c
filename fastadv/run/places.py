"""Where a run finds what it reads from outside: its data, pseudo-labels, the runs of teachers.

A run holds absolute paths, so it does not depend on where a command is started. The table
``places`` of its config.toml holds the same places as seen from the run folder: where a path leads
nowhere, the place beside the run is tried, since the two may have been moved together. What is
found there must have the digest that the run was begun with.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastadv.algorithms.options import all_options
from fastadv.algorithms.parts import PARTS
from fastadv.algorithms.plugins import loaded_files
from fastadv.data.torchvision_sets import PUBLISHED
from fastadv.declared import holds_networks
from fastadv.errors import NotThere, UserError
from fastadv.run.config_file import Places
from fastadv.run.defaults import DEFAULTS
from fastadv.run.request import RunRequest, roles
from fastadv.run.role import Effect, Role
from fastadv.run.spelling import as_flag
from fastadv.storage.printable import printable

SETTINGS = tuple(name for name, role in roles().items() if role.place)
"""The settings that name a place; ``data`` only behind its colon."""
_OPTION = Role()
_HOLDER = Role(Effect.NOTHING, place=True)
PLUGINS = "plugins"
"""The entry of the table ``places`` with the files of ``--plugin``, which are never run from it."""


def of_a_run() -> tuple[str, ...]:
    """The settings and options that name places."""
    return (*SETTINGS, *_holders())


def role_of_option(name: str) -> Role:
    """What the slot or option ``name`` of a part is to a run."""
    return _HOLDER if name in _holders() else _OPTION


def absolute(request: RunRequest) -> RunRequest:
    """``request`` with absolute paths, as seen from the present working directory."""
    here = replace(request, data_root=request.data_root or _usual_root(request))
    return _moved(here, lambda _, path: os.path.abspath(os.path.expanduser(path)))


def seen_from(folder: Path, request: RunRequest) -> Places:
    """The places in ``request``, whose paths are absolute, as seen from ``folder``, and the files
    of plugins."""
    found: Places = {}
    base = os.path.realpath(folder)
    for name, paths in _places(request):
        try:
            found[name] = tuple(os.path.relpath(os.path.realpath(path), base) for path in paths)
        except ValueError:  # on another drive
            continue
    if loaded_files():
        found[PLUGINS] = tuple(map(str, loaded_files()))
    return found


def found_again(
    request: RunRequest, beside: Places, folder: Path, told: Mapping[str, Any]
) -> RunRequest:
    """``request``, read from the run in ``folder``, with the paths that lead somewhere.

    ``told`` are the places that the user names, from the present working directory; ``beside`` are
    those seen from the folder.
    """
    base = os.path.realpath(folder)
    number: dict[str, int] = {}

    def find(name: str, path: str) -> str:
        place = number[name] = number.get(name, -1) + 1
        path = os.path.join(base, path)  # one that was written by hand
        ways = beside.get(name, ())
        if os.path.exists(path) or place >= len(ways):
            return path
        near = os.path.normpath(os.path.join(base, ways[place]))
        return near if os.path.exists(near) else path

    found = _moved(request, find)
    settings = {name: value for name, value in told.items() if name in SETTINGS}
    options = {name: value for name, value in told.items() if name not in SETTINGS}
    if "data" in settings:
        _require_same_kind(str(request.data), settings["data"])
    said = _moved(
        RunRequest(**settings, options=options),
        lambda _, path: os.path.abspath(os.path.expanduser(path)),
    )
    return replace(
        found,
        **{name: getattr(said, name) for name in settings},
        options={**found.options, **said.options},
    )


def require(request: RunRequest, beside: Places, folder: Path, names: Collection[str]) -> None:
    """Raise ``NotThere`` if one of the places ``names`` in ``request`` is not there, with where it
    was looked for and the option that says the new place."""
    for name, paths in _places(request):
        if name not in names or (name in SETTINGS and roles()[name].may_be_missing):
            continue
        for number, path in enumerate(paths):
            if os.path.exists(path):
                continue
            ways = beside.get(name, ())
            looked = [path]
            if number < len(ways):
                looked.append(
                    os.path.normpath(os.path.join(os.path.realpath(folder), ways[number]))
                )
            value = f"{str(request.data).partition(':')[0]}:PATH" if name == "data" else "PATH"
            raise NotThere(
                f"{printable(folder)} reads its {name} from a place that is not there (looked at "
                f"{' and '.join(printable(each) for each in dict.fromkeys(looked))}): say where "
                f"it is now with {as_flag(name)} {value}."
            )


def _require_same_kind(own: str, told: str) -> None:
    one, other = own.partition(":")[0], told.partition(":")[0]
    if one != other and ":" not in own:
        raise UserError(
            f"The run's data are {one}, which are named without a path: omit --data "
            f"{printable(told)}, or say their folder with --data-root."
        )


def _usual_root(request: RunRequest) -> str | None:
    """Where torchvision's data sets are looked for, which depends on the working directory."""
    return "data" if (request.data or DEFAULTS["data"]) in PUBLISHED else None


def _places(request: RunRequest) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The places that ``request`` names: setting or option, and its paths."""
    found: Places = {}

    def note(name: str, path: str) -> str:
        found[name] = (*found.get(name, ()), path)
        return path

    _moved(request, note)
    yield from found.items()


def _moved(request: RunRequest, new: Callable[[str, str], str]) -> RunRequest:
    """``request`` with ``new(name, path)`` in place of every path in it."""
    settings: dict[str, Any] = {}
    for name in SETTINGS:
        value = getattr(request, name)
        if not isinstance(value, (str, os.PathLike)):
            continue
        text = os.fspath(value)
        if name != "data":
            settings[name] = new(name, text)
            continue
        kind, colon, path = text.partition(":")
        if colon and path:
            settings[name] = f"{kind}:{new(name, path)}"
    options = dict(request.options)
    for name in _holders():
        value = options.get(name)
        if isinstance(value, (str, os.PathLike)):
            options[name] = ",".join(new(name, path.strip()) for path in str(value).split(","))
        elif isinstance(value, (list, tuple)):
            options[name] = [
                new(name, os.fspath(each)) if isinstance(each, (str, os.PathLike)) else each
                for each in value
            ]
    return replace(request, **settings, options=options)


def _holders() -> tuple[str, ...]:
    """The options of parts that hold networks, as paths of runs."""
    hints = all_options(part for parts in PARTS.values() for part in parts.values())
    return tuple(name for name, hint in hints.items() if holds_networks(hint))
