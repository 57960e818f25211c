"""A whole run: built, trained to its end or a stop, resumed."""

from __future__ import annotations

from typing import Any

from fastadv.engine.model.precision import tf32
from fastadv.engine.process import distributed
from fastadv.engine.process.determinism import reproducible
from fastadv.engine.process.device import choose_device
from fastadv.errors import NotFinite, UserError
from fastadv.run import divergence, full_memory
from fastadv.run.console import Console
from fastadv.run.epoch_loop import EpochLoop
from fastadv.run.fitting import AUTO, fitted
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_run import Progress, begun_with, check_weights_fit, restore
from fastadv.run.session import Session
from fastadv.run.stopping import stopping_on_signals
from fastadv.training.memory import is_out_of_memory


def train(request: RunRequest, console: Console | None = None) -> dict[str, Any]:
    """Train as ``request`` says in a new run folder; returns the summary written there.

    Raises ``UserError`` for what cannot be done, ``TrainingError`` when a loss is not finite and
    ``Interrupted`` after saving when a signal asks to stop.
    """
    config = resolve_run(request)
    with distributed.joined(choose_device(config.device)):
        if config.batch_size == AUTO:
            config = fitted(request, console or Console())
        session = Session.build(config)
        folder = RunFolder.create(config.out, session.config)
        with folder.alone():
            try:
                return _run(session, folder, Progress(), console or Console())
            except UserError:
                if not session.step.calls:
                    folder.forget_unbegun()
                raise


def resume(path: str, console: Console | None = None) -> dict[str, Any]:
    """Continue the run in ``path`` from its last checkpoint, bit for bit as without a stop."""
    folder = RunFolder.open(path)
    config = folder.read_config()
    with distributed.joined(choose_device(config.device)), folder.alone():
        # A mode that was chosen by measuring may have been given up for a simpler one.
        session = Session.build(
            config,
            strict=False,
            look=lambda data: check_weights_fit(config, data, folder),
            begun=begun_with(folder, config),
        )
        progress = Progress()
        if folder.last.exists():
            progress = restore(session, folder, console or Console())
        elif any(line["epoch"] > 1 for line in folder.read_metrics()):
            raise UserError(
                f"{folder.last} is missing, and the run cannot continue without it; "
                f"{folder.best} still holds its best weights. Train into another --out."
            )
        folder.keep_metrics_before(progress.epoch)
        summary = folder.read_summary()
        if summary is not None and progress.epoch >= config.epochs:
            (console or Console()).finish(summary, folder)
            return summary
        folder.forget_results()
        return _run(session, folder, progress, console or Console())


def _run(
    session: Session, folder: RunFolder, progress: Progress, console: Console
) -> dict[str, Any]:
    runner = EpochLoop(session, folder, progress, console)
    console.start(session, folder, progress.epoch)
    config = session.config
    with reproducible(config.deterministic), tf32(config.tf32), stopping_on_signals(runner):
        try:
            runner.epochs()
            summary = runner.final_test()
        except NotFinite as error:
            raise divergence.explained(error, session, folder) from None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise full_memory.explained(error, runner) from None
    folder.write_summary(summary)
    runner.job.forget()
    console.finish(summary, folder)
    return summary
