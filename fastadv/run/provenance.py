"""What a run depends on: written into last.pt and compared on resume.

What is trained must be the same; a difference that may change single bits is reported.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import platform
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastadv.data.array_file import user_cache
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.models.packaged import library_version, packaged_library
from fastadv.run import places
from fastadv.run.config import RunConfig
from fastadv.run.config_file import tables, to_toml
from fastadv.run.own_schedule import is_own
from fastadv.run.request import roles
from fastadv.run.role import Role
from fastadv.run.spelling import shown
from fastadv.storage.digests import digest
from fastadv.storage.printable import printable

_OPTION = "option "  # before the name of a slot or of an option of a part


def record(config: RunConfig, digests: Mapping[str, str], device: torch.device) -> dict[str, Any]:
    """What the run of ``config`` depends on: ``digests`` of data and networks from outside by
    name, versions, threads, the device."""
    own = {"source of the schedule": source(config.schedule)} if is_own(config.schedule) else {}
    return {
        "configuration": configuration(config),
        "digests": dict(digests),
        "machine": {
            "torch": str(torch.__version__),  # plain, as a checkpoint must be
            "fastadv": version("fastadv"),
            "Python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "processor": _processor(device),
            "processes": distributed.world_size(),
            "source of the network": source(config.model),
            **own,
        },
    }


def configuration(config: RunConfig) -> str:
    """The settings that decide what is trained: without the folder and how often it is saved."""
    return to_toml(dataclasses.replace(config, out=None, checkpoint_minutes=0.0))


def configuration_digest(config: RunConfig) -> str:
    """A digest of the settings that decide what is trained, the same wherever the run lies."""
    settings = _flat(configuration(config))
    return digest({name: settings[name] for name in sorted(settings) if not _role(name).may_change})


def require_own(saved: Mapping[str, Any], config: RunConfig, path: Path) -> None:
    """Raise ``UserError`` unless the checkpoint ``saved`` from ``path`` is of a run of ``config``.

    Weights of one architecture fit any run of it: nothing else would show a mix-up.
    """
    try:
        text = saved.get("configuration") or saved["provenance"]["configuration"]
        differences = list(_differences(text, configuration(config)))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):  # no TOML
        raise UserError(
            f"{printable(path)} does not say which run it belongs to: restore the run's own file."
        ) from None
    for name, before, after in differences:
        if _role(name).may_change:
            continue
        raise UserError(
            f"{printable(path)} is of a run with {name} {shown(before)}, and config.toml says "
            f"{shown(after)}: restore the one that is not of this run."
        )


def compare(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Sentences about settings that were changed, and about what may change single bits. Raises
    ``UserError`` if it is another run."""
    harmless, said = [], []
    for name, began, found in _differences(saved["configuration"], now["configuration"]):
        role = _role(name)
        if not role.may_change:
            chosen = "the best epoch is chosen by it"
            why = chosen if role.chooses else "it decides what is trained"
            raise UserError(
                f"The run was begun with {name} {shown(began)}, and config.toml now says "
                f"{shown(found)}; {why}: restore it, or train into another --out."
            )
        change = f"{name} {shown(began)} before, {shown(found)} now"
        if not role.harmless:
            said.append(change)
        elif not _is_own_cache(name, found):
            harmless.append(change)
    told = []
    if harmless:
        told = [f"settings have changed, and change no weights: {'; '.join(harmless)}."]
    old, new = saved["digests"], now["digests"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            raise UserError(
                f"The run's {name} is not what it was begun with, so this would be another "
                "run: restore it, or train into another --out."
            )
    machine = saved["machine"]
    said += [
        f"{name} {shown(machine.get(name))} before, {shown(value)} now"
        for name, value in now["machine"].items()
        if machine.get(name) != value
    ]
    if not said:
        return told
    return [
        *told,
        f"the run continues under other conditions, so not bit for bit: {'; '.join(said)}.",
    ]


def _differences(before: str, after: str) -> Iterator[tuple[str, Any, Any]]:
    """The settings that have changed: name, before, after."""
    old, new = _flat(before), _flat(after)
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield name, old.get(name), new.get(name)


def _role(name: str) -> Role:
    """What the setting or option ``name`` of ``_flat`` is to a run. One that an older or newer
    version had decides what is trained."""
    if name.startswith(_OPTION):
        return places.role_of_option(name.removeprefix(_OPTION))
    return roles().get(name, Role())


def _flat(text: str) -> dict[str, Any]:
    found = tables(text)
    options = found.pop("options", {})
    return found | {f"{_OPTION}{name}": value for name, value in options.items()}


def _is_own_cache(name: str, now: object) -> bool:
    """True for the cache that ``RunFolder`` takes for a run from elsewhere: nobody has set it."""
    return name == "data_root" and now == str(user_cache())


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {torch.backends.cpu.get_cpu_capability()}"


def source(model: str) -> str:
    """A digest of the source file of a ``module:callable``, or name and version of the library of a
    network; "" for fastadv's own."""
    if packaged_library(model):
        return library_version(model)
    if ":" not in model:
        return ""
    found = importlib.util.find_spec(model.partition(":")[0])  # imported before
    if found is None or found.origin is None:
        return ""
    try:
        with open(found.origin, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError:
        return ""
