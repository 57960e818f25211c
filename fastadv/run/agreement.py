"""Processes that train together say at the start with what they were started."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import fastadv
from fastadv.algorithms.plugins import loaded_files
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.run.config import RunConfig
from fastadv.run.request import roles
from fastadv.run.spelling import as_flag, shown
from fastadv.storage.printable import printable


def require_one_run(config: RunConfig, begins: str) -> None:
    """Raise ``UserError``, the same in all processes, unless all have this ``config``, code and
    plugins. ``begins``: what the process is about to do, such as "a new run"."""
    if distributed.world_size() == 1:
        return
    facts: dict[str, Any] = {"the command": begins}
    for name, role in roles().items():
        if not role.each_process:  # what is in the folder of a run is compared
            facts[as_flag(name)] = shown(getattr(config, name))
    for name, value in config.options.items():
        facts[as_flag(name)] = shown(value)
    for path in loaded_files():
        facts[f"the plugin {Path(path).name}"] = _digest(Path(path))
    facts["the version of fastadv"] = version("fastadv")
    facts["the code of fastadv"] = _code()
    facts["the version of torch"] = str(torch.__version__)
    require_equal(facts)


def require_equal(facts: Mapping[str, Any]) -> None:
    """Raise ``UserError``, the same in all processes, unless all have these ``facts``: name ->
    value. All processes must call it."""
    if distributed.world_size() == 1:
        return
    texts = distributed.told_by_all(json.dumps(dict(facts)), distributed.GROUP_TIMEOUT)
    told = [json.loads(text) for text in texts]
    for rank, other in enumerate(told):
        for name in dict.fromkeys([*told[0], *other]):
            first, second = (each.get(name, "not set") for each in (told[0], other))
            if first != second:
                raise UserError(
                    f"The processes must be started alike, and {printable(name)} is "
                    f"{printable(str(first))} in process 0 and {printable(str(second))} in "
                    f"process {rank}."
                )


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError:
        return "not to be read"


def _code() -> str:
    """A digest of the package's source: an edited checkout has the version of the one before."""
    found = hashlib.sha256()
    folder = Path(fastadv.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        found.update(str(path.relative_to(folder)).encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
