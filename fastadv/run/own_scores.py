"""The scores of a run's own weights while it trains; the best weights are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from fastadv.engine.process import distributed, stop
from fastadv.errors import NotFinite, NotFiniteError
from fastadv.run.console import Console
from fastadv.run.epoch_metrics import percent
from fastadv.run.eval_pass import (
    EvalJob,
    EvalScores,
    EvaluationStopped,
    StopEvaluation,
    run_evaluation,
)
from fastadv.run.eval_records import EvalRecords
from fastadv.run.recovery import lost_best
from fastadv.run.saving import Saving
from fastadv.run.source import EvalBatches
from fastadv.storage.printable import printable


class OwnScores:
    """Evaluates the weights of a run that is being written by ``saving``, until it is ``told`` to
    stop (``StopEvaluation``)."""

    def __init__(self, saving: Saving, console: Console, told: Callable[[], bool]) -> None:
        self.session, self.folder, self.progress = saving.session, saving.folder, saving.progress
        self.saving, self.console = saving, console
        config, data, device = self.session.config, self.session.data, self.session.device
        records = EvalRecords(self.folder)
        self.job = EvalJob(
            config, data, device, records, console=console, asked_to_stop=told
        )  # fmt: skip

    def of_epoch(self) -> dict[str, EvalScores]:
        """Name of a set -> the scores of this epoch's weights on it; the best are kept."""
        config, data = self.session.config, self.session.data
        attacks = ",".join(dict.fromkeys(["clean", config.select_attack]))
        found: dict[str, EvalScores] = {}
        found[config.select] = self.evaluate(data.validation, attacks)
        self._keep_best(found[config.select])
        if config.eval_train is not None:
            found["train"] = self.evaluate(data.training.limited(config.eval_train), attacks)
        return found

    def statistics_batches(self, epoch: int) -> Iterator[Tensor]:
        """Clean, augmented training images of ``epoch`` (from 0), for BatchNorm statistics of
        averaged weights."""
        for batch in self.session.data.loader.epoch(epoch):
            yield batch.image

    def evaluate(self, images: EvalBatches, attacks: str, which: str | None = None) -> EvalScores:
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

    def make_best_again(self) -> None:
        """Write best.pt where it is lost and the run is just behind the best epoch."""
        epoch, best = self.progress.epoch, self.progress.best_epoch
        if not best or epoch != best or self.progress.batch or not self.saving.kept.best:
            return
        lost = lost_best(self.folder, self.session.config, best, trained=epoch)
        if not distributed.any_process(lost is not None, self.session.device):
            return
        with self.session.step.evaluation_weights(self.statistics_batches(epoch - 1)):
            self.folder.save(self.folder.best, self.saving.weights(best))
        self.console.warn(f"{lost} It is made again from the checkpoint.")

    def _keep_best(self, scores: dict[str, float]) -> None:
        """Save the weights if they are the most robust so far; ties go to the cleaner. best.pt
        never holds others than the best."""
        progress = self.progress
        score = scores[self.session.config.select_attack]
        if (score, scores["clean"]) <= (progress.best_score, progress.best_clean):
            return
        progress.best_score, progress.best_clean = score, scores["clean"]
        progress.best_epoch = progress.epoch + 1
        if self.saving.kept.best:
            self.folder.save(self.folder.best, self.saving.weights(progress.best_epoch))
        else:  # those of an epoch before, from when the run kept them, are not the best any more
            self.folder.remove(self.folder.best)


def as_line(scores: EvalScores, of: str) -> dict[str, Any]:
    """``scores`` on the images called ``of``, as a line of metrics.jsonl has them."""
    line: dict[str, Any] = {f"{of}_{name}_percent": percent(scores[name]) for name in scores}
    line[f"{of}_n"] = scores.n
    return line | {
        f"{of}_{name}_interval_percent": [percent(end) for end in scores.interval(name)]
        for name in scores
    }
