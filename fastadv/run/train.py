"""A whole run: built, trained to its end or a stop, resumed."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastadv.engine.model.precision import tf32
from fastadv.engine.process import distributed, stop
from fastadv.engine.process.determinism import reproducible
from fastadv.engine.process.device import choose_device
from fastadv.errors import NotFinite, UserError
from fastadv.run import divergence, full_memory, places
from fastadv.run.agreement import require_equal, require_one_run
from fastadv.run.config import RunConfig, check
from fastadv.run.config_file import to_toml
from fastadv.run.console import Console
from fastadv.run.ended import ended
from fastadv.run.epoch_loop import EpochLoop
from fastadv.run.fitting import AUTO, fitted
from fastadv.run.keeping import kept
from fastadv.run.origin import Origin
from fastadv.run.own_schedule import is_own
from fastadv.run.recovery import ended_without_last, recovered
from fastadv.run.request import RunRequest, roles
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_run import Standing, restore
from fastadv.run.session import Session
from fastadv.run.space import require_space
from fastadv.run.spelling import as_typed, shown
from fastadv.run.unfinished import Unfinished
from fastadv.run.way_on import interrupted
from fastadv.storage.printable import printable
from fastadv.training.memory import is_out_of_memory


def train(request: RunRequest, console: Console | None = None) -> dict[str, Any]:
    """Train as ``request`` says in a new run folder; returns the summary written there.

    Raises ``UserError`` for what cannot be done, ``TrainingError`` when a loss is not finite and
    ``Interrupted`` after saving when a signal asks to stop.
    """
    request = places.absolute(request)
    config = resolve_run(request)
    with distributed.joined(choose_device(config.device)):
        require_one_run(config, "a new run")
        if config.batch_size == AUTO:
            config = fitted(request, console or Console())
        session = Session.build(config)
        require_equal(session.digests())
        folder = RunFolder.create(config.out, session.config)
        stop.something_exists()
        with folder.alone():
            try:
                return _run(session, folder, Standing(), console or Console())
            except UserError:
                if not session.step.calls:
                    folder.forget_unbegun()
                raise
            except stop.Stopped as stopped:
                if distributed.world_size() == 1:
                    folder.forget_unbegun()
                if folder.config.exists():
                    raise interrupted(folder.path, stopped.by) from None
                raise


def resume(
    path: str,
    console: Console | None = None,
    moved: Mapping[str, Any] | None = None,
    *,
    changed: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Continue the run in ``path`` from its last checkpoint, bit for bit as without a stop.

    ``moved`` says where things are now that the run reads from outside (``fastadv.run.places``);
    they must be what they were, and config.toml then names the new place. ``changed``: settings
    with another value this time.
    """
    folder = RunFolder.open(path)
    try:
        return _resume(folder, console or Console(), moved, changed or {})
    except stop.Stopped as stopped:
        raise interrupted(folder.path, stopped.by) from None


def unneeded(folder: RunFolder, config: RunConfig) -> list[Path]:
    """The files that a finished run of ``config`` does not keep. last.pt is removed last: with
    previous.pt alone, the run would go on from there."""
    found = [folder.guarded, folder.last_good, *Unfinished(folder.unfinished).of_the_run()]
    return (
        found if kept(config.keep).last else [*found, folder.previous, folder.averaged, folder.last]
    )


def _resume(
    folder: RunFolder,
    console: Console,
    moved: Mapping[str, Any] | None,
    changed: Mapping[str, Any],
) -> dict[str, Any]:
    stored = folder.read_config(moved, needs=places.of_a_run())
    origins = {**stored.origins, **dict.fromkeys(changed, Origin.USER)}
    config = dataclasses.replace(stored, **changed, origins=origins)
    noted = {
        name: value
        for name, value in changed.items()
        if roles()[name].noted and value != getattr(stored, name)
    }
    if changed:
        check(config)
    if is_own(config.schedule):
        folder.require_trusted(f"schedule {config.schedule}")
    with distributed.joined(choose_device(config.device)), folder.alone():
        require_one_run(config, "a run that goes on")
        begun = recovered(folder, stored, console)  # what is there is what the file says
        summary = ended_without_last(begun)
        if summary is not None:
            _require_tested_so(folder, stored, noted)
            console.finish_again(summary, folder)
            return summary
        session = Session.build(config, begun)
        require_equal(session.digests())
        standing = Standing()
        if begun.saved is not None:
            standing = restore(session, begun, console)
            if moved:
                folder.note(moved, {})
        elif any(line["epoch"] > stored.save_every for line in folder.read_metrics()):
            raise UserError(
                f"{printable(folder.last)} is missing, and the run cannot continue without it; "
                f"{printable(folder.best)} still holds its best weights. Train into another --out."
            )
        del begun  # the memory of the checkpoint
        summary = ended(folder, config, standing.progress.epoch)
        if summary is not None:
            _require_tested_so(folder, stored, noted)
        if noted:  # what is in the folder is of the file, also for the same command again
            folder.note({}, noted)
        folder.keep_metrics_before(standing.progress.epoch)
        if summary is not None:
            folder.remove(*unneeded(folder, config))  # a kill may have come before
            console.finish_again(summary, folder)
            return summary
        folder.forget_results()
        return _run(session, folder, standing, console)


def _require_tested_so(folder: RunFolder, stored: RunConfig, noted: Mapping[str, Any]) -> None:
    """Raise ``UserError`` if what is ``noted`` of a run that has ended would say that it was tested
    otherwise than it was."""
    other = [name for name in noted if roles()[name].only_measures]
    if other:
        words = ", ".join(
            f"{as_typed(name, noted[name])} (there: {shown(getattr(stored, name))})"
            for name in other
        )
        raise UserError(
            f"{printable(folder.path)} has ended, with other settings than this command: {words}. "
            f"Omit what differs, or evaluate it otherwise (fastadv evaluate "
            f"{shlex.quote(printable(str(folder.path)))})."
        )


def _run(
    session: Session, folder: RunFolder, standing: Standing, console: Console
) -> dict[str, Any]:
    require_space(folder, session)
    runner = EpochLoop(session, folder, standing, console)
    console.start(session, folder, standing.progress.epoch)
    config = session.config
    with reproducible(config.deterministic), tf32(config.tf32), stop.handled(), stop.held():
        try:
            if not standing.progress.epoch:
                runner.events.begin(to_toml(config))
            runner.epochs()
            summary = runner.final_test()
        except NotFinite as error:
            raise divergence.explained(error, session, folder) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise full_memory.explained(error, runner) from None
        runner.events.finish(summary, config.epochs)
        folder.write_summary(summary)
        folder.remove(*unneeded(folder, config))
        console.finish(summary, folder)
    return summary
