"""What a resumed run does about damaged checkpoints: it says so, and uses the one before.

Training again from the checkpoint before gives the same bits, so nothing is lost but time.
"""

from __future__ import annotations

import os
from typing import Any

from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.run import provenance
from fastadv.run.begun import Begun, progress_of
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.ended import ended
from fastadv.run.keeping import kept
from fastadv.run.run_folder import RunFolder
from fastadv.storage import checkpoint, files
from fastadv.storage.printable import printable

_ENDS = " Train into another --out."


def recovered(folder: RunFolder, config: RunConfig, console: Console) -> Begun:
    """The run, after last.pt was made a checkpoint that can be read, where there is one.

    A damaged or missing last.pt is replaced by previous.pt. If best.pt is damaged or missing before
    the run of ``config`` has ended, and previous.pt is from before the best epoch, last.pt is
    replaced too, so that this epoch is trained again. Raises ``UserError`` if there was a
    checkpoint and none can be read.
    """
    saved = None
    if distributed.rank() == 0:
        saved = _last(folder, console)
        done = ended(folder, config, progress_of(saved, "epoch")) is not None
        if saved is not None and kept(config.keep).best and not done:
            saved = _looked_at_best(folder, config, saved, console)
    distributed.wait()
    return Begun.read(folder, config) if distributed.rank() else Begun(folder, config, saved)


def _last(folder: RunFolder, console: Console) -> dict[str, Any] | None:
    """What last.pt holds, or previous.pt, which then is last.pt too; None if there is neither."""
    if not any(os.path.lexists(path) for path in (folder.last, folder.previous)):
        return None
    try:
        return checkpoint.load(folder.last)
    except checkpoint.DamagedError as error:
        if not os.path.lexists(folder.previous):
            raise UserError(f"{error} There is no checkpoint before it.{_ENDS}") from None
        try:
            before = checkpoint.load(folder.previous)
        except checkpoint.DamagedError as other:
            raise UserError(f"{error} {other}{_ENDS}") from None
        console.warn(f"{error} The run continues from the checkpoint before, {_at(before)}.")
        _go_back(folder)
        return before


def _looked_at_best(
    folder: RunFolder, config: RunConfig, saved: dict[str, Any], console: Console
) -> dict[str, Any]:
    """Say that best.pt is lost, if it is, and do what can be done; returns the checkpoint from
    which the run goes on."""
    try:
        provenance.require_own(saved, config, folder.last)
    except UserError:
        return saved  # ``restore`` says better what was changed
    best = progress_of(saved, "best_epoch")
    trained = progress_of(saved, "epoch")
    problem = lost_best(folder, config, best, trained) if best else None
    if problem is None:
        return saved
    if best_from_kept(folder, best):
        console.warn(f"{problem} It is made again from {printable(folder.kept(best))}.")
        return saved
    if trained == best and not progress_of(saved, "batch"):
        return saved  # the weights are those of the checkpoint: ``OwnScores`` writes them
    try:
        before = checkpoint.load(folder.previous)
    except UserError:
        before = {}
    if before and progress_of(before, "epoch") < best + (not progress_of(before, "batch")):
        console.warn(
            f"{problem} The run goes back to the checkpoint before, {_at(before)}, and trains that "
            "epoch again."
        )
        _go_back(folder)
        return before
    console.warn(
        f"{problem} The run goes on; unless a later epoch is better, it ends with the results of "
        "the last weights alone."
    )
    return saved


def lost_best(
    folder: RunFolder, config: RunConfig, epoch: int, trained: int | None = None
) -> str | None:
    """A sentence if best.pt does not hold the weights of ``epoch`` (from 1), else None. Raises
    ``UserError`` if they are of another run than that of ``config``.

    A run that goes on after ``trained`` epochs has lost nothing if they are of a later epoch: it
    is trained again, and is the best again.
    """
    try:
        saved = checkpoint.load(folder.best)
    except checkpoint.DamagedError as error:
        return f"{error} It held the weights of the best epoch, {epoch}."
    provenance.require_own(saved, config, folder.best)
    found = saved.get("epoch")
    if trained is not None and type(found) is int and found > trained:
        return None
    if found != epoch:
        return f"{printable(folder.best)} does not hold the weights of the best epoch, {epoch}."
    return None


def best_from_kept(folder: RunFolder, epoch: int) -> bool:
    """Write best.pt again from the weights kept in epochs/; False if those are not there."""
    try:
        saved = checkpoint.load(folder.kept(epoch))
    except UserError:
        return False
    if saved.get("epoch") != epoch:
        return False
    checkpoint.save(folder.best, saved)
    return True


def ended_without_last(begun: Begun) -> dict[str, Any] | None:
    """The summary of a run that has ended and kept no last.pt; None for any other. Raises
    ``UserError`` if the run is to be longer now."""
    folder, config = begun.folder, begun.config
    if kept(config.keep).last or begun.saved is not None:
        return None
    summary = ended(folder, config)
    if summary is None and folder.read_summary() is not None:
        raise UserError(
            f"{printable(folder.path)} has ended and kept no last.pt (--keep "
            f"{','.join(config.keep)}), so it cannot be made longer: train into another --out."
        )
    return summary


def _go_back(folder: RunFolder) -> None:
    """Make previous.pt last.pt."""
    try:
        files.keep(folder.previous, folder.last)
    except OSError as error:
        raise checkpoint.not_written(error, folder.last) from None


def _at(saved: dict[str, Any]) -> str:
    """Where a checkpoint is in its run, in words."""
    epoch, batch = progress_of(saved, "epoch"), progress_of(saved, "batch")
    return f"of epoch {epoch}" if not batch else f"within epoch {epoch + 1}"
