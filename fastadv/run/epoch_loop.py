"""The epoch loop: train, evaluate, save. It knows no method."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from typing import Any

from torch import Tensor

from fastadv.data.batch import LoaderBatch
from fastadv.data.broken import BrokenImages
from fastadv.engine.process import distributed, stop
from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.epoch_costs import EpochCosts
from fastadv.run.epoch_metrics import EpochMetrics
from fastadv.run.eval_pass import StopEvaluation
from fastadv.run.events import Events
from fastadv.run.final_test import final_test
from fastadv.run.going_back import Overfitted, answer, go_back
from fastadv.run.guard import Guard
from fastadv.run.own_scores import OwnScores, as_line
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_run import Standing
from fastadv.run.saving import Saving
from fastadv.run.session import Session
from fastadv.run.stop_request import StopRequest
from fastadv.run.way_on import interrupted

CHECK_EVERY_BATCHES = 50  # batches between two readings of the fault flag


class EpochLoop:
    """One pass through the epochs that are left."""

    def __init__(
        self, session: Session, folder: RunFolder, standing: Standing, console: Console
    ) -> None:
        self.session, self.folder = session, folder
        self.progress, self.console = standing.progress, console
        self.events = Events(folder.path)
        data, device = session.data, session.device
        self._metrics = EpochMetrics(len(data.loader), device)
        self._costs = EpochCosts(device)
        self._guard = None if session.config.guard_overfitting is None else Guard(session)
        self.saving = Saving(session, folder, self.progress, self._metrics, self._guard)
        self.stops = StopRequest(device, len(data.loader), CHECK_EVERY_BATCHES)
        self.scores = OwnScores(self.saving, console, self.stops.told)
        self._image_size: tuple[int, ...] | None = None  # of the batch before
        self._trained = 0  # batches in this process
        if standing.seen is not None:
            self._metrics.load_state(standing.seen["epoch_metrics"])
            if self._guard is not None:
                self._guard.load_state(standing.seen["guard"])

    def epochs(self) -> None:
        """Train, evaluate and save, epoch by epoch."""
        total = self.session.config.epochs
        self.scores.make_best_again()
        if self._guard is not None:
            self.console.say(self._guard.sentence())
        while self.progress.epoch < total:
            try:
                with distributed.short_timeout():
                    self._train_epoch()
            except Overfitted:
                assert self._guard is not None
                go_back(self._guard, self.saving, self._metrics, self.console)
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
                self.saving.last()

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
                alone_and_old = distributed.world_size() == 1 and self.saving.is_due()
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
            self.stops.by = stopped.by
            self._stop()

    def _watch(self, guard: Guard, metrics: dict[str, Tensor], images: int) -> None:
        """Let the guard see a step's ``metrics``, and look at the network if it is due."""
        guard.add(metrics, images)
        if not guard.is_due(self.progress.batch):
            return
        self.session.step.check()
        if not guard.look():
            if guard.does == "back" and not guard.seen.collapsed:
                self.saving.guarded()
            return
        answer(guard, self.saving, self.console)

    def _batches(self) -> Generator[LoaderBatch, None, None]:
        """The batches that are left of the epoch. If an image cannot be decoded, the run is saved;
        several processes have saved it when the last checkpoint was due."""
        progress = self.progress
        try:
            yield from self.session.data.loader.epoch(progress.epoch, progress.batch)
        except BrokenImages as error:
            raise UserError(f"{error} {self.saving.between_steps()}".rstrip()) from None

    def _follow_size(self, images: Tensor) -> None:
        """Drop what is compiled for images of another size than that of ``images`` (B,C,H,W)."""
        size = tuple(images.shape[-2:])
        if self._image_size not in (None, size):
            self.session.step.internals.forget_shapes()
        self._image_size = size

    def _look(self, seconds: float) -> None:
        """Read the fault flag, and save when the last checkpoint is old."""
        self.session.step.check()
        if distributed.any_process(self.saving.is_due(), self.session.device):
            self.saving.last(extra_seconds=seconds)

    def _asked_to_stop(self) -> bool:
        """True if the run is to stop after this batch."""
        return self.stops.agreed(self.progress.batch, self._trained)

    def _stop(self, save: bool = True) -> None:
        self.session.step.check()
        by = self.stops.reason()
        if save:
            self.saving.last()
        raise interrupted(self.folder.path, by)

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
        keeps = self.saving.kept.keeps(progress.epoch + 1)
        if evaluates or keeps:
            began = time.monotonic()
            with step.evaluation_weights(self.scores.statistics_batches(progress.epoch)):
                if keeps:
                    self.folder.keep(progress.epoch + 1, self.saving.weights(progress.epoch + 1))
                found = self.scores.of_epoch() if evaluates else {}
            before = sum(scores.seconds_before for scores in found.values())
            progress.eval_seconds += time.monotonic() - began + before
            for name, scores in found.items():
                line |= as_line(scores, name)
        line["train_seconds"] = round(progress.train_seconds, 3)
        line["eval_seconds"] = round(progress.eval_seconds, 3)
        self.folder.add_metrics(line)
        self.events.add(line)
        self.console.line(line)

    def final_test(self) -> dict[str, Any]:
        """Test accuracy of the best and the last weights, measured once."""
        try:
            return final_test(self.scores)
        except StopEvaluation:
            self._stop(save=False)  # the last checkpoint has everything
            raise
