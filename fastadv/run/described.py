"""A run that was read back, in one line."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from fastadv.errors import UserError
from fastadv.run.config import RunConfig
from fastadv.run.run_folder import RunFolder
from fastadv.run.which import WEIGHTS
from fastadv.storage.printable import printable


def described(folder: RunFolder, config: RunConfig, which: str, saved: Mapping[str, Any]) -> str:
    """Where the run lies, its method, data and network, and the weights ``which`` from the
    checkpoint ``saved``: their epoch and their accuracy on the test images, or where they were not
    tested, on those of the metrics."""
    name = f"{which} weights" if which in WEIGHTS else "weights"
    epoch = saved.get("epoch", saved.get("progress", {}).get("epoch"))
    told = [f"{config.method} on {config.data}", config.model, name]
    if epoch is not None:
        told[-1] += f" of epoch {epoch} of {config.epochs}"
    with suppress(UserError, OSError):  # what lies beside the weights may be damaged
        told += _accuracy(folder, config, which, epoch)
    return printable(f"<Run {folder.path}: {', '.join(told)}>")


def _accuracy(folder: RunFolder, config: RunConfig, which: str, epoch: object) -> list[str]:
    tested = (folder.read_summary() or {}).get(which)
    if tested:
        return [f"test {attack} {100 * score:.2f} %" for attack, score in tested.items()]
    line = next((each for each in folder.read_metrics() if each["epoch"] == epoch), {})
    return [
        f"{config.select} {attack} {line[key]:.2f} %"
        for attack in ("clean", config.select_attack)
        if (key := f"{config.select}_{attack}_percent") in line
    ]
