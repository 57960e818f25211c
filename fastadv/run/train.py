"""The epoch loop: train, evaluate, save. It knows no method."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastadv.engine.model.precision import tf32
from fastadv.engine.optimizer.faults import all_finite
from fastadv.engine.process import distributed
from fastadv.engine.process.determinism import reproducible
from fastadv.engine.process.device import choose_device
from fastadv.errors import Interrupted, NotFiniteError, TrainingError, UserError
from fastadv.run import provenance
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.eval_pass import EvalJob, EvalScores, StopEvaluation, run_evaluation
from fastadv.run.eval_records import EvalRecords
from fastadv.run.events import Events
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import check_fit
from fastadv.run.session import Session, data_facts
from fastadv.run.source import EvalBatches, Source
from fastadv.storage import checkpoint
from fastadv.storage.printable import printable

FORWARDED_SIGNAL_SECONDS = 2.0
CHECK_EVERY_BATCHES = 50  # batches between two readings of the fault flag


@dataclass
class Progress:
    """Where a run is. ``batch`` counts the batches of ``epoch`` already trained on."""

    epoch: int = 0
    batch: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    best_epoch: int = 0
    best_score: float = -1.0
    best_clean: float = -1.0


def train(request: RunRequest, console: Console | None = None) -> dict[str, Any]:
    """Train as ``request`` says in a new run folder; returns the summary written there.

    Raises ``UserError`` for what cannot be done, ``TrainingError`` when a loss is not finite and
    ``Interrupted`` after saving when a signal asks to stop.
    """
    config = resolve_run(request)
    with distributed.joined(choose_device(config.device)):
        session = Session.build(config)
        folder = RunFolder.create(config.out, session.config)
        with folder.alone():
            try:
                return _run(session, folder, Progress(), console or Console())
            except UserError:
                folder.forget_unbegun()
                raise


def resume(path: str, console: Console | None = None) -> dict[str, Any]:
    """Continue the run in ``path`` from its last checkpoint, bit for bit as without a stop."""
    folder = RunFolder.open(path)
    config = folder.read_config()
    with distributed.joined(choose_device(config.device)), folder.alone():
        # A mode that was chosen by measuring may have been given up for a simpler one.
        session = Session.build(config, strict=False, look=lambda data: _fits(config, data, folder))
        progress = Progress()
        if folder.last.exists():
            progress = _restore(session, folder, console or Console())
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
    runner = _Runner(session, folder, progress, console)
    console.start(session, folder, progress.epoch)
    config = session.config
    with reproducible(config.deterministic), tf32(config.tf32), _stopping_on_signals(runner):
        try:
            runner.epochs()
        except TrainingError as error:
            if session.step.healthy():
                raise
            state = session.model.state_dict()
            if not all_finite(list(state.values())):
                raise
            folder.save(folder.last_good, {"model": state})
            raise TrainingError(f"{error} They are saved in {folder.last_good}.") from None
        summary = runner.final_test()
    folder.write_summary(summary)
    runner.job.forget()
    console.finish(summary, folder)
    return summary


class _Runner:
    """One pass through the epochs that are left."""

    def __init__(
        self, session: Session, folder: RunFolder, progress: Progress, console: Console
    ) -> None:
        self.session, self.folder = session, folder
        self.progress, self.console = progress, console
        self.events = Events(folder.path)
        self._provenance = _provenance(session)
        self.stop_requested: str | None = None
        config, data, device = session.config, session.data, session.device
        self.job = EvalJob(
            config,
            data,
            device,
            EvalRecords(folder),
            console=console,
            check_stop=lambda: self._heed(),
        )
        self._loss = torch.zeros((), dtype=torch.float64, device=session.device)
        self._saved_at = time.monotonic()
        if folder.last.exists():
            saved = checkpoint.load(folder.last)
            self._loss.copy_(saved["loss_sum"])

    def epochs(self) -> None:
        """Train, evaluate and save, epoch by epoch."""
        total = self.session.config.epochs
        while self.progress.epoch < total:
            self._train_epoch()
            try:
                self._evaluate_epoch(last=self.progress.epoch + 1 == total)
            except StopEvaluation:
                self._stop()
            self.progress.epoch += 1
            self.progress.batch = 0
            self._loss.zero_()
            self._save()

    def _train_epoch(self) -> None:
        session, progress = self.session, self.progress
        began = time.monotonic()
        batches = session.data.loader.epoch(progress.epoch, progress.batch)
        session.model.train()
        with self.console.epoch(progress.epoch, progress.batch, len(session.data.loader)) as tick:
            for batch in batches:
                second = None if batch.second is None else batch.second[0]
                metrics = session.step(
                    batch.image, batch.label, batch.index, view=batch.view, second=second
                )
                self._loss += metrics["loss"]
                progress.batch += 1
                tick(len(batch.label))
                alone_and_old = distributed.world_size() == 1 and self._checkpoint_due()
                if progress.batch % CHECK_EVERY_BATCHES == 0 or alone_and_old:
                    self._look(time.monotonic() - began)
                if self._asked_to_stop():
                    progress.train_seconds += time.monotonic() - began
                    self._stop()
        session.step.check()
        progress.train_seconds += time.monotonic() - began
        self._advise()

    def _look(self, seconds: float) -> None:
        """Read the fault flag, and save when the last checkpoint is old."""
        self.session.step.check()
        if distributed.any_process(self._checkpoint_due(), self.session.device):
            self._save(extra_seconds=seconds)

    def _checkpoint_due(self) -> bool:
        """True once ``checkpoint_minutes`` have passed since the last checkpoint."""
        minutes = (time.monotonic() - self._saved_at) / 60
        return minutes >= self.session.config.checkpoint_minutes

    def _asked_to_stop(self) -> bool:
        """True if this process was told to stop; several processes ask at the same batches."""
        done, batches = self.progress.batch, len(self.session.data.loader)
        if distributed.world_size() > 1 and done % CHECK_EVERY_BATCHES and done < batches:
            return False
        return self._told_to_stop()

    def _told_to_stop(self) -> bool:
        told = self.stop_requested is not None
        if distributed.any_process(told, self.session.device) and not told:
            self.stop_requested = "another process"
        return self.stop_requested is not None

    def _heed(self) -> None:
        """End the evaluation when asked to stop. The model may hold an average: save elsewhere."""
        if self._told_to_stop():
            raise StopEvaluation

    def _stop(self, save: bool = True) -> None:
        self.session.step.check()
        if save:
            self._save()
        raise Interrupted(
            f"Stopped by {self.stop_requested}; continue with: "
            f"fastadv train --resume {self.folder.path}"
        )

    def _advise(self) -> None:
        """After a fifth of the run, print what the parts advise."""
        total = self.session.config.epochs
        fifth = max(1, round(total / 5))
        if self.progress.epoch + 1 == fifth:
            for sentence in self.session.step.advice():
                self.console.warn(sentence)

    def _evaluate_epoch(self, *, last: bool) -> None:
        session, progress = self.session, self.progress
        config, step = session.config, session.step
        batches = len(session.data.loader)
        line: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "loss": float(self._loss) / batches,
            "lr": session.optimizer.param_groups[0]["lr"],
        }
        if last or (progress.epoch + 1) % config.eval_every == 0:
            began = time.monotonic()
            with step.evaluation_weights(self._statistics_batches()):
                scores = self._evaluate(session.data.validation, f"clean,{config.select_attack}")
                self._keep_best(scores)
            progress.eval_seconds += time.monotonic() - began + scores.seconds_before
            line |= {f"{config.select}_{name}": score for name, score in scores.items()}
            line[f"{config.select}_n"] = scores.n
            for name in scores:
                line[f"{config.select}_{name}_interval"] = list(scores.interval(name))
        line["train_seconds"] = round(progress.train_seconds, 3)
        line["eval_seconds"] = round(progress.eval_seconds, 3)
        self.folder.add_metrics(line)
        self.events.add(line)
        self.console.line(line)

    def _statistics_batches(self) -> Iterator[Tensor]:
        """Clean, augmented training images, for BatchNorm statistics of averaged weights."""
        last = self.session.config.epochs - 1
        for batch in self.session.data.loader.epoch(min(self.progress.epoch, last)):
            yield batch.image

    def _evaluate(self, images: EvalBatches, attacks: str, which: str | None = None) -> EvalScores:
        """Scores of the session's weights, those of the last epoch, or of the named ones."""
        session, config, last = self.session, self.session.config, self.folder.last
        self.job.which = which or f"the weights of epoch {self.progress.epoch + 1}"
        tested = images is session.data.test
        self.job.images_name = "test images" if tested else "validation images"
        try:
            return run_evaluation(
                session.model,
                images,
                attacks.split(","),
                self.job,
                eps=session.threat.eps,
                alpha=config.eval_alpha,
                seed=config.seed,
                one_pass=which is None,
            )
        except NotFiniteError as error:
            saved = f" {last} still holds what was saved before." if last.exists() else ""
            raise TrainingError(
                f"After step {session.step.calls} what the network computes is no longer finite. "
                f"{error}{saved} Lower the learning rate to train it."
            ) from None

    def _keep_best(self, scores: dict[str, float]) -> None:
        """Save the weights if they are the most robust so far; ties go to the cleaner."""
        progress = self.progress
        score = scores[self.session.config.select_attack]
        if (score, scores["clean"]) <= (progress.best_score, progress.best_clean):
            return
        progress.best_score, progress.best_clean = score, scores["clean"]
        progress.best_epoch = progress.epoch + 1
        self.folder.save(self.folder.best, self._weights())

    def _weights(self) -> dict[str, Any]:
        """The session's weights, and of which run they are."""
        return {
            "model": self.session.model.state_dict(),
            "built_for": _built_for(self.session),
            "configuration": provenance.configuration(self.session.config),
        }

    def _save(self, extra_seconds: float = 0.0) -> None:
        session = self.session
        progress = asdict(self.progress)
        progress["train_seconds"] += extra_seconds
        payload: dict[str, Any] = {
            "model": session.model.state_dict(),
            "built_for": _built_for(session),
            "optimizer": session.optimizer.state_dict(),
            "step": session.step.state_dict(),
            "progress": progress,
            "loss_sum": self._loss,
            "processes": distributed.collected(_own(session)),
            "data": _sizes(session),
            "provenance": self._provenance,
        }
        self.folder.save(self.folder.last, payload)
        self._saved_at = time.monotonic()

    def final_test(self) -> dict[str, Any]:
        """Test accuracy of the best and the last weights, measured once."""
        try:
            return self._final_test()
        except StopEvaluation:
            self._stop(save=False)  # the last checkpoint has everything
            raise

    def _final_test(self) -> dict[str, Any]:
        session, config = self.session, self.session.config
        began = time.monotonic()
        with session.step.evaluation_weights(self._statistics_batches()):
            last = self._evaluate(session.data.test, config.test_attacks, "last weights")
            if session.step.plan.averaging is not None:
                self.folder.save(self.folder.averaged, self._weights())
        before = last.seconds_before
        live = {name: value.clone() for name, value in session.model.state_dict().items()}
        best = last
        if self.progress.best_epoch != config.epochs:
            saved = checkpoint.load(self.folder.best)
            provenance.require_own(saved, config, self.folder.best)
            checkpoint.load_weights(session.model, saved["model"], self.folder.best)
            best = self._evaluate(session.data.test, config.test_attacks, "best weights")
            session.model.load_state_dict(live)
            before += best.seconds_before
        self.progress.eval_seconds += time.monotonic() - began + before
        return {
            "n": last.n,
            "best": best,
            "last": last,
            "intervals": {
                which: {name: list(found.interval(name)) for name in found}
                for which, found in (("best", best), ("last", last))
            },
            "best_epoch": self.progress.best_epoch,
            "train_seconds": round(self.progress.train_seconds, 2),
            "eval_seconds": round(self.progress.eval_seconds, 2),
        }


def _fits(config: RunConfig, data: Source, folder: RunFolder) -> None:
    """Check that the folder's weights fit its network before memory is allocated for it."""
    if folder.last.exists():
        saved = checkpoint.load(folder.last).get("model")
        check_fit(config, data_facts(data), saved, folder.last)


def _built_for(session: Session) -> dict[str, int]:
    """What a network was built for besides its configuration."""
    return {"num_classes": session.data.num_classes, "in_channels": session.data.channels}


def _provenance(session: Session) -> dict[str, Any]:
    return provenance.record(session.config, session.digests(), session.device)


def _sizes(session: Session) -> dict[str, int]:
    """Sizes of the data that must be the same on resume."""
    data = session.data
    return {
        "images": data.num_samples,
        "images to train on": data.trained_on,
        "batches per epoch": len(data.loader),
    }


def _own(session: Session) -> dict[str, Any]:
    """The rank-local state: random generators and the parts' own state, one entry per process."""
    state = {name: tensor.cpu() for name, tensor in session.step.rank_local_state.items()}
    own: dict[str, Any] = {"state": state, "rng": torch.get_rng_state()}
    if session.device.type == "cuda":
        own["cuda_rng"] = torch.cuda.get_rng_state(session.device)
    return own


def _restore(session: Session, folder: RunFolder, console: Console) -> Progress:
    saved = checkpoint.load(folder.last)
    try:
        progress = Progress(**saved["progress"])
        for name, now in _sizes(session).items():
            if saved["data"][name] != now:
                raise UserError(
                    f"The run had {saved['data'][name]} {name}, now there are {now}: resume with "
                    "the same data on as many processes."
                )
        if progress.best_epoch and not folder.best.exists():
            raise UserError(
                f"{printable(folder.best)} is missing, the weights of epoch {progress.best_epoch}: "
                "restore it, or train into another --out."
            )
        for sentence in provenance.compare(saved["provenance"], _provenance(session)):
            console.warn(sentence)
        checkpoint.load_weights(session.model, saved["model"], folder.last)
        session.optimizer.load_state_dict(saved["optimizer"])
        # In a run that goes on with more processes the new ones begin with process 0's state; with
        # fewer, that of the others is lost.
        own = dict(enumerate(saved["processes"])).get(distributed.rank(), {})
        session.step.load_state_dict(saved["step"], own.get("state"))
        if "rng" in own:
            torch.set_rng_state(own["rng"])
        if "cuda_rng" in own and session.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], session.device)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"The checkpoint {folder.last} does not belong to this run ({error})."
        ) from None
    return progress


@contextmanager
def _stopping_on_signals(runner: _Runner) -> Iterator[None]:
    """The first SIGINT or SIGTERM asks the run to save and stop, a second one ends it at once.

    A SIGTERM within ``FORWARDED_SIGNAL_SECONDS`` of the first signal is ignored: torchrun forwards
    a signal that its workers have already received.
    """
    asked = 0.0

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if not runner.stop_requested:
            runner.stop_requested, asked = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT or time.monotonic() - asked > FORWARDED_SIGNAL_SECONDS:
            raise KeyboardInterrupt

    try:
        previous = {
            number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)
        }
    except ValueError:
        yield  # not in the main thread, which alone may handle signals
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
