"""A whole run: built, trained to its end or a stop, resumed."""

from __future__ import annotations

import dataclasses
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
from fastadv.run.config import RunConfig
from fastadv.run.config_file import to_toml
from fastadv.run.console import Console
from fastadv.run.epoch_loop import EpochLoop, goes_on
from fastadv.run.fitting import AUTO, fitted
from fastadv.run.initial import known
from fastadv.run.keeping import kept
from fastadv.run.recovery import ended_without_last, recover
from fastadv.run.request import RunRequest, roles
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_run import Progress, begun_with, check_weights_fit, restore
from fastadv.run.session import Session
from fastadv.run.space import require_space
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
                return _run(session, folder, Progress(), console or Console())
            except UserError:
                if not session.step.calls:
                    folder.forget_unbegun()
                raise
            except stop.Stopped as stopped:
                if distributed.world_size() == 1:
                    folder.forget_unbegun()
                if folder.config.exists():
                    raise goes_on(folder, stopped.by) from None
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
        return _resume(folder, console, moved, changed or {})
    except stop.Stopped as stopped:
        raise goes_on(folder, stopped.by) from None


def unneeded(folder: RunFolder, config: RunConfig) -> list[Path]:
    """The files that a finished run of ``config`` does not keep. last.pt is removed last: with
    previous.pt alone, the run would go on from there."""
    found = [folder.guarded, folder.last_good]
    return (
        found if kept(config.keep).last else [*found, folder.previous, folder.averaged, folder.last]
    )


def _resume(
    folder: RunFolder,
    console: Console | None,
    moved: Mapping[str, Any] | None,
    changed: Mapping[str, Any],
) -> dict[str, Any]:
    config = dataclasses.replace(folder.read_config(moved, needs=places.of_a_run()), **changed)
    with distributed.joined(choose_device(config.device)), folder.alone():
        require_one_run(config, "a run that goes on")
        recover(folder, config, console or Console())
        ended = ended_without_last(folder, config)
        if ended is not None:
            (console or Console()).finish_again(ended, folder)
            return ended
        # A mode that was chosen by measuring may have been given up for a simpler one.
        session = Session.build(
            config,
            strict=None if "mode" in changed else False,
            look=lambda data: check_weights_fit(config, data, folder),
            initial=known(folder, config),
            begun=begun_with(folder, config),
        )
        require_equal(session.digests())
        progress = Progress()
        if folder.last.exists():
            progress = restore(session, folder, console or Console())
            if moved:
                folder.note(moved, {})
        elif any(line["epoch"] > config.save_every for line in folder.read_metrics()):
            raise UserError(
                f"{printable(folder.last)} is missing, and the run cannot continue without it; "
                f"{printable(folder.best)} still holds its best weights. Train into another --out."
            )
        measured = {n: value for n, value in changed.items() if roles()[n].only_measures}
        if measured:  # the results are those of the file, also for the same command again
            folder.note({}, measured)
        folder.keep_metrics_before(progress.epoch)
        summary = folder.read_summary()
        if summary is not None and progress.epoch >= config.epochs:
            folder.remove(*unneeded(folder, config))  # a kill may have come before
            (console or Console()).finish_again(summary, folder)
            return summary
        folder.forget_results()
        return _run(session, folder, progress, console or Console())


def _run(
    session: Session, folder: RunFolder, progress: Progress, console: Console
) -> dict[str, Any]:
    require_space(folder, session)
    runner = EpochLoop(session, folder, progress, console)
    console.start(session, folder, progress.epoch)
    config = session.config
    with reproducible(config.deterministic), tf32(config.tf32), stop.handled(), stop.held():
        try:
            if not progress.epoch:
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
        runner.job.forget()
        folder.remove(*unneeded(folder, config))
        console.finish(summary, folder)
    return summary
