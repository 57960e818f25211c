"""The epoch loop: train, evaluate, save. It knows no method."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from fastadv.data.batch import LoaderBatch
from fastadv.data.broken import BrokenImages
from fastadv.engine.process import distributed, stop
from fastadv.errors import NotFinite, NotFiniteError, TrainingError, UserError
from fastadv.run import provenance
from fastadv.run.console import Console
from fastadv.run.ended import EPOCHS
from fastadv.run.epoch_costs import EpochCosts
from fastadv.run.epoch_metrics import EpochMetrics, percent
from fastadv.run.eval_pass import (
    EvalJob,
    EvalScores,
    EvaluationStopped,
    StopEvaluation,
    run_evaluation,
)
from fastadv.run.eval_records import EvalRecords
from fastadv.run.events import Events
from fastadv.run.guard import Guard
from fastadv.run.keeping import kept
from fastadv.run.recovery import best_from_kept, lost_best
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_run import Progress, Standing, contents, made_for, provenance_of, take_over
from fastadv.run.session import Session
from fastadv.run.source import EvalBatches
from fastadv.run.way_on import continued, interrupted
from fastadv.storage import checkpoint
from fastadv.storage.printable import printable

CHECK_EVERY_BATCHES = 50  # batches between two readings of the fault flag
ASK_EVERY = 2.0  # seconds between two questions of several processes whether one was told to stop


class _Overfitted(Exception):
    """The network has overfitted, and the run is to go back."""


class EpochLoop:
    """One pass through the epochs that are left."""

    def __init__(
        self, session: Session, folder: RunFolder, standing: Standing, console: Console
    ) -> None:
        self.session, self.folder = session, folder
        self.progress, self.console = standing.progress, console
        self.events = Events(folder.path)
        self._kept = kept(session.config.keep)
        self._provenance = provenance_of(session)
        self.stop_requested: str | None = None
        config, data, device = session.config, session.data, session.device
        self.job = EvalJob(
            config,
            data,
            device,
            EvalRecords(folder),
            console=console,
            asked_to_stop=lambda: self._evaluation_should_stop(),
        )
        self._metrics = EpochMetrics(len(data.loader), device)
        self._costs = EpochCosts(device)
        self._image_size: tuple[int, ...] | None = None  # of the batch before
        self._saved_at = time.monotonic()
        self._trained = 0  # batches in this process
        self._ask_at = 0  # batch of the epoch after which the processes ask each other
        self._asked_at, self._trained_then = time.monotonic(), 0
        self._guard = None if config.guard_overfitting is None else Guard(session)
        if standing.seen is not None:
            self._metrics.load_state(standing.seen["epoch_metrics"])
            if self._guard is not None:
                self._guard.load_state(standing.seen["guard"])

    def epochs(self) -> None:
        """Train, evaluate and save, epoch by epoch."""
        total = self.session.config.epochs
        self._make_best_again()
        if self._guard is not None:
            self.console.say(self._guard.sentence())
        while self.progress.epoch < total:
            try:
                with distributed.short_timeout():
                    self._train_epoch()
            except _Overfitted:
                self._go_back()
                continue
            try:
                self._evaluate_epoch(last=self.progress.epoch + 1 == total)
            except StopEvaluation:
                self._stop()
            self.progress.epoch += 1
            self.progress.batch = 0
            self._metrics.clear()
            if self.progress.epoch % self.session.config.save_every == 0 or (
                self.progress.epoch == total
            ):
                self._save()

    def _train_epoch(self) -> None:
        session, progress = self.session, self.progress
        began = time.monotonic()
        session.model.train()
        self._costs.begin()
        with (
            closing(self._batches()) as batches,  # at the end of Python nothing could be caught
            self.console.epoch(progress.epoch, progress.batch, len(session.data.loader)) as tick,
        ):
            for batch in batches:
                self._follow_size(batch.image)
                second = None if batch.second is None else batch.second[0]
                alpha = None if self._guard is None else self._guard.step_sizes(batch.image)
                metrics = self._updated(
                    batch.image, batch.label, batch.index, view=batch.view, second=second,
                    alpha=alpha,
                )  # fmt: skip
                self._metrics.add(metrics, len(batch.label))
                progress.batch += 1
                self._trained += 1
                stop.note_progress()
                if progress.batch == len(session.data.loader):  # before anything can stop the run
                    self._metrics.ask(session.step.plan)
                self._costs.add(len(batch.label))
                if self._guard is not None:
                    self._watch(self._guard, metrics, len(batch.label))
                tick(len(batch.label), self._metrics.loss)
                alone_and_old = distributed.world_size() == 1 and self._checkpoint_due()
                if progress.batch % CHECK_EVERY_BATCHES == 0 or alone_and_old:
                    self._look(time.monotonic() - began)
                if self._asked_to_stop():
                    progress.train_seconds += time.monotonic() - began
                    self._stop()
        session.step.check()
        self._costs.end()
        progress.train_seconds += time.monotonic() - began
        self._advise()

    def _updated(self, *inputs: Any, **options: Any) -> Any:
        """An update. A long one, such as one that compiles, is undone when the run is to stop; the
        first one of this process at once."""
        step = self.session.step
        before = step.calls
        if distributed.world_size() > 1:  # the others would wait for this one
            return step(*inputs, **options)
        try:
            with stop.interruptible(stop.GRACE if self._trained else 0.0):
                return step(*inputs, **options)
        except stop.Stopped as stopped:
            if stop.insists() or step.calls != before or not self._trained:
                raise  # nothing to save, or an update whose metrics are lost
            self.stop_requested = stopped.by
            self._stop()

    def _watch(self, guard: Guard, metrics: dict[str, Tensor], images: int) -> None:
        """Let the guard see a step's ``metrics``, and look at the network if it is due."""
        guard.add(metrics, images)
        if not guard.is_due(self.progress.batch):
            return
        self.session.step.check()
        if not guard.look():
            if guard.does == "back" and not guard.seen.collapsed:
                self.folder.save(self.folder.guarded, self._payload(self.progress))
            return
        if guard.does == "tell":
            self.console.warn(f"{guard.alarm()}; a smaller attack step or a random start helps.")
        elif guard.may_go_back and self._sound_state() is not None:
            raise _Overfitted
        else:
            tries = f" again, after going back {guard.seen.backs} times" if guard.seen.backs else ""
            best = f"; {self.folder.best} holds the best" if self.progress.best_epoch else ""
            back = "" if guard.does == "back" else ", or with --guard-overfitting back"
            raise TrainingError(
                f"Stopped by {guard.alarm()}{tries}{best}. Train with a smaller attack step "
                f"(--alpha) or a random start (--start uniform){back}."
            )

    def _sound_state(self) -> tuple[dict[str, Any], Path] | None:
        """The last state without overfitting that can be read, and its file; guarded.pt may be
        lost, and checkpoints are only written more seldom."""
        for path in (self.folder.guarded, self.folder.last, self.folder.previous):
            try:
                saved = checkpoint.load(path)
            except checkpoint.DamagedError:
                continue
            provenance.require_own(saved, self.session.config, path)
            if not (saved.get("guard") or {}).get("collapsed", True):
                return saved, path
        return None

    def _go_back(self) -> None:
        """Return to the last state without overfitting, with a smaller step of the attack."""
        guard, progress = self._guard, self.progress
        found = self._sound_state()
        assert guard is not None
        assert found is not None
        sentence = guard.alarm()
        saved, path = found
        if path != self.folder.guarded:
            self.console.warn(
                f"{printable(self.folder.guarded)} is lost; {printable(path)} takes its place."
            )
        take_over(self.session, saved, path, self.console)
        # best.pt stays, whichever way its weights were found; so does the time that was spent.
        progress.epoch, progress.batch = saved["progress"]["epoch"], saved["progress"]["batch"]
        self._metrics.load_state(saved["epoch_metrics"])
        guard.went_back(saved["guard"])
        self.folder.keep_metrics_before(progress.epoch)
        self._save()
        self.console.warn(
            f"{sentence}; back to epoch {progress.epoch + 1}, batch {progress.batch}, with the "
            f"attack's step times {0.5**guard.seen.backs:g}."
        )

    def _batches(self) -> Generator[LoaderBatch, None, None]:
        """The batches that are left of the epoch. If an image cannot be decoded, the run is saved;
        several processes have saved it when the last checkpoint was due."""
        progress = self.progress
        try:
            yield from self.session.data.loader.epoch(progress.epoch, progress.batch)
        except BrokenImages as error:
            raise UserError(f"{error} {self.save_between_steps()}".rstrip()) from None

    def save_between_steps(self) -> str:
        """Save the run after something beside its updates went wrong, and return how to continue;
        "" if nothing was trained. Several processes cannot, since one of them is not asked."""
        session = self.session
        if distributed.world_size() > 1 or not session.step.calls or not session.step.healthy():
            return ""
        self._save()
        return f"The run is saved; {continued(self.folder.path)}"

    def _follow_size(self, images: Tensor) -> None:
        """Drop what is compiled for images of another size than that of ``images`` (B,C,H,W)."""
        size = tuple(images.shape[-2:])
        if self._image_size not in (None, size):
            self.session.step.internals.forget_shapes()
        self._image_size = size

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
        told = self._evaluation_should_stop()
        if distributed.world_size() == 1:
            return told
        done, batches = self.progress.batch, len(self.session.data.loader)
        if done < self._ask_at and done < batches:
            return False
        now = time.monotonic()
        took = (now - self._asked_at) / max(1, self._trained - self._trained_then)
        self._asked_at, self._trained_then = now, self._trained
        # All wait for the slowest one, and choose the same batch for the next question.
        anyone, slowest = distributed.most([float(told), took], self.session.device)
        self._ask_at = done + max(1, min(CHECK_EVERY_BATCHES, int(ASK_EVERY / max(slowest, 1e-9))))
        if self._ask_at > batches:
            self._ask_at = 0 if done == batches else batches
        if anyone and not told:
            self.stop_requested = "another process"
        return bool(anyone)

    def _evaluation_should_stop(self) -> bool:
        """True if this process was told to stop. Called between two steps of an evaluation, in
        which the model may hold an average: nothing is saved there."""
        self.stop_requested = self.stop_requested or stop.asked()
        return self.stop_requested is not None

    def _stop(self, save: bool = True) -> None:
        self.session.step.check()
        self.stop_requested = self.stop_requested or stop.asked() or "another process"
        if save:
            self._save()
        raise interrupted(self.folder.path, self.stop_requested)

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
        line: dict[str, Any] = {"epoch": progress.epoch + 1, **self._metrics.line()}
        if self._guard is not None:
            line |= self._guard.line()
        line["lr"] = session.optimizer.param_groups[0]["lr"]
        if step.internals.radius is not None:  # that of the last update
            last_batch = 1 / len(session.data.loader)
            line["eps"] = step.internals.radius.at(progress.epoch + 1 - last_batch)
        line |= self._costs.line()
        evaluates = last or (progress.epoch + 1) % config.eval_every == 0
        keeps = self._kept.keeps(progress.epoch + 1)
        if evaluates or keeps:
            began = time.monotonic()
            with step.evaluation_weights(self._statistics_batches(progress.epoch)):
                if keeps:
                    self.folder.keep(progress.epoch + 1, self._weights(progress.epoch + 1))
                found = self._scores() if evaluates else {}
            before = sum(scores.seconds_before for scores in found.values())
            progress.eval_seconds += time.monotonic() - began + before
            for name, scores in found.items():
                line |= _named(scores, name)
        line["train_seconds"] = round(progress.train_seconds, 3)
        line["eval_seconds"] = round(progress.eval_seconds, 3)
        self.folder.add_metrics(line)
        self.events.add(line)
        self.console.line(line)

    def _scores(self) -> dict[str, EvalScores]:
        """Name of a set -> the scores of this epoch's weights on it; the best are kept."""
        config, data = self.session.config, self.session.data
        attacks = ",".join(dict.fromkeys(["clean", config.select_attack]))
        found: dict[str, EvalScores] = {}
        found[config.select] = self._evaluate(data.validation, attacks)
        self._keep_best(found[config.select])
        if config.eval_train is not None:
            found["train"] = self._evaluate(data.training.limited(config.eval_train), attacks)
        return found

    def _statistics_batches(self, epoch: int) -> Iterator[Tensor]:
        """Clean, augmented training images of ``epoch`` (from 0), for BatchNorm statistics of
        averaged weights."""
        for batch in self.session.data.loader.epoch(epoch):
            yield batch.image

    def _evaluate(self, images: EvalBatches, attacks: str, which: str | None = None) -> EvalScores:
        """Scores of the session's weights, those of the last epoch, or of the named ones."""
        session, config, last = self.session, self.session.config, self.folder.last
        self.job.which = which or f"the weights of epoch {self.progress.epoch + 1}"
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
        except EvaluationStopped:
            if stop.asked() is None or stop.insists():
                raise
            raise StopEvaluation from None  # a pass was too long to wait for its end
        except NotFiniteError as error:
            saved = (
                f" {printable(last)} still holds what was saved before." if last.exists() else ""
            )
            raise NotFinite(
                f"After step {session.step.calls} what the network computes is no longer finite. "
                f"{error}{saved}"
            ) from None

    def _keep_best(self, scores: dict[str, float]) -> None:
        """Save the weights if they are the most robust so far; ties go to the cleaner."""
        progress = self.progress
        score = scores[self.session.config.select_attack]
        if (score, scores["clean"]) <= (progress.best_score, progress.best_clean):
            return
        progress.best_score, progress.best_clean = score, scores["clean"]
        progress.best_epoch = progress.epoch + 1
        if self._kept.best:
            self.folder.save(self.folder.best, self._weights(progress.best_epoch))

    def _make_best_again(self) -> None:
        """Write best.pt where it is lost and the run is just behind the best epoch."""
        epoch, best = self.progress.epoch, self.progress.best_epoch
        if not best or epoch != best or self.progress.batch or not self._kept.best:
            return
        lost = lost_best(self.folder, self.session.config, best, trained=epoch)
        if not distributed.any_process(lost is not None, self.session.device):
            return
        with self.session.step.evaluation_weights(self._statistics_batches(epoch - 1)):
            self.folder.save(self.folder.best, self._weights(best))
        self.console.warn(f"{lost} It is made again from the checkpoint.")

    def _weights(self, epoch: int) -> dict[str, Any]:
        """The session's weights, those after ``epoch`` (from 1), and of which run they are."""
        return {
            "model": self.session.model.state_dict(),
            "epoch": epoch,
            **made_for(self.session),
            "configuration": provenance.configuration(self.session.config),
        }

    def _save(self, extra_seconds: float = 0.0) -> None:
        progress = replace(self.progress, train_seconds=self.progress.train_seconds + extra_seconds)
        began = time.monotonic()
        self.folder.save_last(self._payload(progress), keep_previous=self._kept.previous)
        self._saved_at = time.monotonic()
        stop.saved_in(self._saved_at - began)

    def _payload(self, progress: Progress) -> dict[str, Any]:
        payload = contents(self.session, progress, self._metrics.state(), self._provenance)
        if self._guard is not None:
            payload["guard"] = self._guard.state()
        return payload

    def final_test(self) -> dict[str, Any]:
        """Test accuracy of the best and the last weights, measured once."""
        try:
            return self._final_test()
        except StopEvaluation:
            self._stop(save=False)  # the last checkpoint has everything
            raise

    def _has_best(self) -> bool:
        """True if best.pt has the weights of the best epoch; if it should, and has not, this is
        said."""
        if not self._kept.best:
            return False
        best = self.progress.best_epoch
        lost = lost_best(self.folder, self.session.config, best)
        if not distributed.any_process(lost is not None, self.session.device):
            return True
        made = distributed.rank() == 0 and best_from_kept(self.folder, best)
        if distributed.any_process(made, self.session.device):
            return True
        self.console.warn(
            f"{lost} The results are those of the last weights alone; to have both, restore it, "
            f"delete {printable(self.folder.summary)} and --resume."
        )
        return False

    def _final_test(self) -> dict[str, Any]:
        session, config = self.session, self.session.config
        began = time.monotonic()
        with session.step.evaluation_weights(self._statistics_batches(config.epochs - 1)):
            last = self._evaluate(session.data.test, config.test_attacks, "last weights")
            if session.step.plan.averaging is not None:
                self.folder.save(self.folder.averaged, self._weights(config.epochs))
        before = last.seconds_before
        live = {name: value.clone() for name, value in session.model.state_dict().items()}
        best: EvalScores | None = last
        if self.progress.best_epoch != config.epochs and not self._has_best():
            best = None
        elif self.progress.best_epoch != config.epochs:
            saved = checkpoint.load(self.folder.best)
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
                which: found and {name: list(found.interval(name)) for name in found}
                for which, found in (("best", best), ("last", last))
            },
            EPOCHS: config.epochs,
            "best_epoch": self.progress.best_epoch,
            "train_seconds": round(self.progress.train_seconds, 2),
            "eval_seconds": round(self.progress.eval_seconds, 2),
        }


def _named(scores: EvalScores, of: str) -> dict[str, Any]:
    """``scores`` on the images called ``of``, as a line of metrics.jsonl has them."""
    line: dict[str, Any] = {f"{of}_{name}_percent": percent(scores[name]) for name in scores}
    line[f"{of}_n"] = scores.n
    return line | {
        f"{of}_{name}_interval_percent": [percent(end) for end in scores.interval(name)]
        for name in scores
    }
