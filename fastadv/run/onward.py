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
from fastadv.run.request import RunRequest, as_flag, setting_types
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder, usual_place
from fastadv.run.train import resume, train, unneeded
from fastadv.storage.printable import printable

MAY_DIFFER = frozenset(
    {"out", "download", "device", "checkpoint_minutes", "save_every", "keep"}
    | {"skip_broken", "guard_overfitting"}
)
"""Settings of one invocation: those of the folder hold on where the command says nothing. All of
them may change on resume (``provenance.may_change``)."""
_CHOSEN = {"mode": "auto", "fused_norm": "auto", "batch_size": "auto"}
"""Settings whose value "auto" the run has replaced by what it measured."""


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
    _require_same(request, asked, config, place)
    summary = folder.read_summary()
    if summary is not None and len(folder.read_metrics()) >= config.epochs:
        leftover = [file for file in unneeded(folder, config) if file.exists()]
        if leftover:  # a kill came before they were removed
            with folder.alone():
                folder.remove(*leftover)
        if distributed.speaks():
            (console or Console()).finish_again(summary, folder)
        return summary
    moved = _moved(request, asked, config)
    return resume(str(place), console, moved, changed=_of_this_time(request, asked))


def for_this_time(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among ``given`` that a run which goes on may have otherwise, in their own types.
    Where it lies is not one of them."""
    types = setting_types()
    return {
        name: coerce(as_flag(name), value, types[name])
        for name, value in given.items()
        if name in MAY_DIFFER and name != "out"
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


def _of_this_time(request: RunRequest, asked: RunConfig) -> dict[str, Any]:
    """What ``request`` says of ``MAY_DIFFER``."""
    given = [name for name in MAY_DIFFER if getattr(request, name) is not None]
    return {name: getattr(asked, name) for name in given}


def _require_same(request: RunRequest, asked: RunConfig, config: RunConfig, place: Path) -> None:
    """Raise ``UserError`` that names what ``request`` says otherwise than the ``config`` of the
    run in ``place``."""
    different = []
    for name in setting_types():
        said, held = getattr(asked, name), getattr(config, name)
        free = name in MAY_DIFFER or name in places.SETTINGS  # a place is compared by its content
        if getattr(request, name) is None or free or said == held:
            continue
        if said != _CHOSEN.get(name):
            different.append((name, said, held))
    for name, value in request.options.items():
        place_of_it = name in places.of_a_run()
        if (
            value is not None
            and not place_of_it
            and asked.options.get(name) != config.options.get(name)
        ):
            different.append((name, asked.options.get(name), config.options.get(name)))
    if not different:
        return
    listed = ", ".join(
        f"{_given(name, said)} (there: {_given(name, held) if type(held) is bool else _word(held)})"
        for name, said, held in different
    )
    shown = printable(str(place))
    raise UserError(
        f"{shown} holds a run with other settings than this command: {listed}. Give those of the "
        f"run, continue it with --resume {shlex.quote(shown)}, or choose another --out."
    )


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _given(name: str, value: object) -> str:
    """The option as it is typed."""
    if type(value) is bool:
        return _flag(name if value else f"no-{name}")
    return f"{_flag(name)} {_word(value)}"


def _word(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return printable(f"{value:.6g}" if isinstance(value, float) else str(value))
