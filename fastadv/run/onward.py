"""The same command again begins a run, continues it, or shows what it found."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadv.declared import coerce
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.run import places
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.ended import ended
from fastadv.run.fitting import AUTO
from fastadv.run.request import RunRequest, roles, setting_types
from fastadv.run.resolve import resolve_run
from fastadv.run.role import Role
from fastadv.run.run_folder import RunFolder, usual_place
from fastadv.run.spelling import as_flag, as_typed, shown
from fastadv.run.train import resume, train, unneeded
from fastadv.storage.printable import printable


def train_or_resume(request: RunRequest, console: Console | None = None) -> dict[str, Any]:
    """Train as ``request`` says, or continue the run that the same request began; returns the
    summary. The folder is that of ``request.out``, or runs/METHOD-DATA without a number.

    What a finished run has found is shown again. Raises ``UserError`` if the folder holds a run
    with other settings than those of ``request``, and as ``train`` and ``resume`` do.
    """
    request = places.absolute(request)
    asked = resolve_run(request)
    place = Path(asked.out) if asked.out is not None else usual_place(asked)
    folder = RunFolder(place)
    if not folder.config.exists():
        return train(dataclasses.replace(request, out=str(place)), console)
    config = folder.read_config()
    summary = ended(folder, config)
    _require_same(request, asked, config, place, ended=summary is not None)
    if summary is not None:
        leftover = [file for file in unneeded(folder, config) if file.exists()]
        if leftover and distributed.speaks():  # a kill came before they were removed
            with folder.alone():
                folder.remove(*leftover)
        if distributed.speaks():
            (console or Console()).finish_again(summary, folder)
        return summary
    moved = _moved(request, asked, config)
    return resume(str(place), console, moved, changed=_of_this_time(request, asked, config))


def for_this_time(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among ``given`` that a run which goes on may have otherwise, in their own types.
    Where it lies is not one of them."""
    types, known = setting_types(), roles()
    return {
        name: coerce(as_flag(name), value, types[name])
        for name, value in given.items()
        if name in known and known[name].of_invocation and name != "out"
    }


def _moved(request: RunRequest, asked: RunConfig, config: RunConfig) -> dict[str, Any]:
    """The places that ``request`` names and that are others than those of ``config``."""
    said = {name: getattr(request, name, None) for name in places.SETTINGS} | dict(request.options)
    before = {name: getattr(config, name) for name in places.SETTINGS} | config.options
    now = {name: getattr(asked, name) for name in places.SETTINGS} | asked.options
    return {
        name: said[name]
        for name in places.of_a_run()
        if said.get(name) is not None and now.get(name) != before.get(name)
    }


def _of_this_time(request: RunRequest, asked: RunConfig, config: RunConfig) -> dict[str, Any]:
    """What ``request`` says otherwise than ``config``, and a run that goes on may change."""
    return {
        name: getattr(asked, name)
        for name, role in roles().items()
        if role.of_invocation and _says_another(name, role, request, asked, config)
    }


def _says_another(
    name: str, role: Role, request: RunRequest, asked: RunConfig, config: RunConfig
) -> bool:
    said = getattr(asked, name)
    if getattr(request, name) is None or said == getattr(config, name):
        return False
    return not (role.measured and said == AUTO)  # the run holds what was measured


def _require_same(
    request: RunRequest, asked: RunConfig, config: RunConfig, place: Path, *, ended: bool
) -> None:
    """Raise ``UserError`` that names what ``request`` says otherwise than the ``config`` of the
    run in ``place``, and that a run which goes on cannot change. One that has ``ended`` cannot
    change how it was evaluated either."""
    different = []
    for name, role in roles().items():
        free = role.place or role.of_invocation  # a place is compared by its content
        if ended and role.only_measures:
            free = False
        if not free and _says_another(name, role, request, asked, config):
            different.append((name, getattr(asked, name), getattr(config, name)))
    for name, value in request.options.items():
        said, held = asked.options.get(name), config.options.get(name)
        if value is not None and not places.role_of_option(name).place and said != held:
            different.append((name, said, held))
    if not different:
        return
    listed = ", ".join(
        f"{as_typed(name, said)} (there: "
        f"{as_typed(name, held) if type(held) is bool else shown(held)})"
        for name, said, held in different
    )
    here = printable(str(place))
    quoted = shlex.quote(here)
    way = (
        f"evaluate it otherwise (fastadv evaluate {quoted})"
        if ended
        else f"continue it with --resume {quoted}"
    )
    raise UserError(
        f"{here} holds a run with other settings than this command: {listed}. Give those of the "
        f"run, {way}, or choose another --out."
    )
