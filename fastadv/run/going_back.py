"""What a run does that has overfitted: it says so, stops, or goes back with a smaller step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastadv.errors import TrainingError
from fastadv.run import provenance
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.epoch_metrics import EpochMetrics
from fastadv.run.guard import Guard
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_run import take_over
from fastadv.run.saving import Saving
from fastadv.storage import checkpoint
from fastadv.storage.printable import printable


class Overfitted(Exception):
    """The network has overfitted, and the run is to go back."""


def answer(guard: Guard, saving: Saving, console: Console) -> None:
    """Do what ``--guard-overfitting`` says of a network that has just overfitted. Raises
    ``Overfitted`` and ``TrainingError``."""
    if guard.does == "tell":
        console.warn(f"{guard.alarm()}; a smaller attack step or a random start helps.")
        return
    folder, config = saving.folder, saving.session.config
    if guard.may_go_back and sound_state(folder, config) is not None:
        raise Overfitted
    tries = f" again, after going back {guard.seen.backs} times" if guard.seen.backs else ""
    best = f"; {folder.best} holds the best" if saving.progress.best_epoch else ""
    back = "" if guard.does == "back" else ", or with --guard-overfitting back"
    raise TrainingError(
        f"Stopped by {guard.alarm()}{tries}{best}. Train with a smaller attack step "
        f"(--alpha) or a random start (--start uniform){back}."
    )


def sound_state(folder: RunFolder, config: RunConfig) -> tuple[dict[str, Any], Path] | None:
    """The last state without overfitting that can be read, and its file; guarded.pt may be
    lost, and checkpoints are only written more seldom."""
    for path in (folder.guarded, folder.last, folder.previous):
        try:
            saved = checkpoint.load(path)
        except checkpoint.DamagedError:
            continue
        provenance.require_own(saved, config, path)
        if not (saved.get("guard") or {}).get("collapsed", True):
            return saved, path
    return None


def go_back(guard: Guard, saving: Saving, metrics: EpochMetrics, console: Console) -> None:
    """Return to the last state without overfitting, with a smaller step of the attack."""
    folder, progress = saving.folder, saving.progress
    found = sound_state(folder, saving.session.config)
    assert found is not None
    sentence = guard.alarm()
    saved, path = found
    if path != folder.guarded:
        console.warn(f"{printable(folder.guarded)} is lost; {printable(path)} takes its place.")
    take_over(saving.session, saved, path, console)
    # best.pt stays, whichever way its weights were found; so does the time that was spent.
    progress.epoch, progress.batch = saved["progress"]["epoch"], saved["progress"]["batch"]
    metrics.load_state(saved["epoch_metrics"])
    guard.went_back(saved["guard"])
    folder.keep_metrics_before(progress.epoch)
    saving.last()
    console.warn(
        f"{sentence}; back to epoch {progress.epoch + 1}, batch {progress.batch}, with the "
        f"attack's step times {0.5**guard.seen.backs:g}."
    )
