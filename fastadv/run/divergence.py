"""What a run that diverged leaves behind, and how to go on from there."""

from __future__ import annotations

from fastadv.engine.optimizer.faults import all_finite
from fastadv.errors import TrainingError, UserError
from fastadv.run.run_folder import RunFolder
from fastadv.run.session import Session
from fastadv.run.spelling import as_typed
from fastadv.run.way_on import train_command
from fastadv.storage.printable import printable

SLOWER = 3  # the learning rate that is proposed is this many times smaller


def explained(error: TrainingError, session: Session, folder: RunFolder) -> TrainingError:
    """``error`` with the usual suspects of this run and the command that goes on from the last good
    weights, which are saved if the step has masked a bad update."""
    saved = _save_last_good(session, folder)
    return TrainingError(f"{error} {saved}{_suspects(session)}{_way_out(session, folder)}")


def _save_last_good(session: Session, folder: RunFolder) -> str:
    if session.step.healthy():  # what is evaluated overflowed: the weights are no good ones
        return ""
    state = session.model.state_dict()
    if not all_finite(list(state.values())):
        return ""
    try:
        folder.save(folder.last_good, {"model": state})
    except UserError as error:
        return f"They could not be saved: {error} "
    return f"They are saved in {printable(folder.last_good)}. "


def _suspects(session: Session) -> str:
    """What usually is the cause, of what this run uses: generic settings, then what parts name."""
    config = session.config
    found = [f"--lr {config.lr:g}"]
    if config.amp and config.amp_dtype == "fp16":
        found.append("--amp-dtype fp16")
    options = config.plan.options
    for part in config.plan.parts.values():
        known = {name: options.get(name) for name in part.suspects}
        found += [as_typed(name, value) for name, value in known.items() if value]
    said = dict.fromkeys(found)
    return f"The usual suspects of this run: {', '.join(said)}. "


def _way_out(session: Session, folder: RunFolder) -> str:
    kept = next((file for file in (folder.last_good, folder.best) if file.exists()), None)
    begin = [] if kept is None else ["--init", str(kept)]
    slower = float(f"{session.config.lr / SLOWER:.2g}")
    command = train_command(
        "--config", str(folder.config), *begin, "--lr", f"{slower:g}", "--out",
        f"{folder.path}-slower",
    )  # fmt: skip
    return f"To go on more slowly: {command}"
