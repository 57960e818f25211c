"""Which weights of a run are meant: the best, the last, or those that were kept after an epoch."""

from __future__ import annotations

import os
from pathlib import Path

from fastadv.errors import UserError, unknown
from fastadv.run.run_folder import RunFolder
from fastadv.run.way_on import resume_command
from fastadv.storage.printable import printable

WEIGHTS = ("best", "last")
BOTH = "both"
_EPOCH = "epoch "


def weights_named(which: str) -> tuple[str, ...]:
    """The weights that ``which`` names: "best", "last", "both", or the number of an epoch, whose
    weights are called "epoch 10". Raises ``UserError`` for anything else."""
    if which == BOTH:
        return WEIGHTS
    number = which.removeprefix(_EPOCH)
    if number.isascii() and number.isdigit():
        return (f"{_EPOCH}{int(number)}",)
    if which not in WEIGHTS:
        raise unknown("weights", which, (*WEIGHTS, BOTH, "the number of an epoch"))
    return (which,)


def one_named(which: str) -> str:
    """``weights_named`` for what takes one network. Raises ``UserError`` for both."""
    name, *others = weights_named(which)
    if others:
        raise UserError(f"One network is needed here: choose {' or '.join(WEIGHTS)} weights.")
    return name


def weights_file(folder: RunFolder, which: str) -> Path:
    """The file of the weights that are evaluated as ``which`` (a name of ``weights_named``). Raises
    ``UserError`` for weights that were not kept."""
    if which in WEIGHTS:
        file = folder.best
        if which == "last":
            file = folder.averaged if folder.averaged.exists() else folder.last
        if not os.path.lexists(file):
            raise UserError(_has_none(folder, which))
        return file
    file = folder.kept(int(which.removeprefix(_EPOCH)))
    if not file.exists():
        raise UserError(
            f"{printable(folder.path)} has not kept the weights of {which}: {_those_kept(folder)}."
        )
    return file


def _has_none(folder: RunFolder, which: str) -> str:
    """Why the best or the last weights cannot be read, and what helps."""
    file = folder.best if which == "best" else folder.last
    shown = printable(folder.path)
    says = f"{shown} has no {file.name}, so its {which} weights cannot be evaluated"
    keep = folder.read_config().keep
    if which not in keep:
        return f"{says}: it was trained with --keep {','.join(keep)}."
    return f"{says}: train it ({resume_command(folder.path)}), or restore the file."


def _those_kept(folder: RunFolder) -> str:
    """What can be evaluated in place of an epoch that is not there, as half a sentence."""
    found = [file.stem for file in folder.epochs.glob("*.pt")]
    kept = sorted(int(name) for name in found if name.isascii() and name.isdigit())
    if not kept:
        return (
            "train with --keep every-10 to keep those of epochs, or name its best or last weights"
        )
    if len(kept) > 6:
        return f"of its {len(kept)} kept epochs the first is {kept[0]} and the last {kept[-1]}"
    return f"it has those of {', '.join(map(str, kept))}"
