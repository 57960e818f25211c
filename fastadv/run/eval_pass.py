"""An evaluation that shows its progress, reports its precision, and can be interrupted.

Each attack is one pass over the images. The counts of a pass are stored in the run folder every few
seconds and on an interruption. The same evaluation later continues from there, with the same result
as without a stop, because the noise of an image depends on its position.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from fastadv.declared import parse_number
from fastadv.engine.model.precision import shown
from fastadv.engine.process import distributed
from fastadv.errors import warn
from fastadv.evaluation.accuracy import count, specs_of
from fastadv.evaluation.counts import Counts
from fastadv.evaluation.intervals import Scores
from fastadv.evaluation.tally import Tally
from fastadv.models import VARIANTS
from fastadv.run import provenance
from fastadv.run.config import RunConfig
from fastadv.run.console import Console, Terminal
from fastadv.run.eval_records import EvalRecords, Record, Settings
from fastadv.run.session import data_facts
from fastadv.run.source import EvalBatches, Source
from fastadv.storage.digests import digest

KEEP_EVERY = 5.0  # seconds between two savings of a running pass
TESTED = "test images"


class StopEvaluation(Exception):
    """Raised by ``check_stop`` after a batch, the same one in all processes."""


class EvaluationStopped(KeyboardInterrupt):
    """The evaluation was interrupted; ``scores`` holds the finished attacks."""

    def __init__(self, scores: EvalScores, sentence: str) -> None:
        super().__init__(sentence)
        self.scores = scores


class EvalScores(Scores):
    """Scores. ``said``: the threat and the precision; ``stored``: the attacks that were evaluated
    before; ``seconds_before``: the time that the stored results had taken; ``facts``: for results
    that last, what they depend on besides the attack."""

    def __init__(self, n: int, said: str) -> None:
        super().__init__({}, n)
        self.said = said
        self.stored: list[str] = []
        self.seconds_before = 0.0
        self.facts: Settings = {}


@dataclass
class EvalJob:
    """What is evaluated. ``which`` and ``images_name`` name weights and images in messages.

    ``lasting``: each attack's result is a line in evaluations.jsonl. Otherwise results are stored
    only to continue an interrupted evaluation, until ``forget``.
    """

    config: RunConfig
    data: Source
    device: torch.device
    records: EvalRecords
    which: str = "weights"
    images_name: str = "images"
    console: Console = field(default_factory=lambda: Console(Terminal(quiet=True)))
    check_stop: Callable[[], None] = lambda: None
    lasting: bool = False
    kept: list[Settings] = field(default_factory=list)

    def forget(self) -> None:
        """Delete the stored passes once their results are written elsewhere."""
        while self.kept:
            self.records.drop(self.kept.pop())


def run_evaluation(
    model: nn.Module,
    images: EvalBatches,
    attacks: list[str],
    job: EvalJob,
    *,
    eps: float,
    alpha: float | str | None,
    seed: int,
    one_pass: bool = False,
) -> EvalScores:
    """``fastadv.evaluate`` in the model's own precision, shared by all processes.

    ``one_pass``: all attacks in one pass, which is stored only while it runs. Raises as
    ``fastadv.evaluate`` does, ``StopEvaluation`` as ``job.check_stop`` does, and
    ``EvaluationStopped`` for a ``KeyboardInterrupt``.
    """
    alpha = None if alpha is None else parse_number(alpha, "alpha")
    attacks = list(specs_of(attacks, alpha))
    precision = shown(None, model, job.device)
    said = f"{job.config.norm} eps {eps:.4g}, evaluated in {precision}"
    title = (
        f"evaluating {job.which} on {len(images):,} {job.images_name} under {', '.join(attacks)}: "
        f"{job.config.norm} eps {eps:.4g}, {precision}"
    )
    threat = {"eps": eps, "norm": job.config.norm, "alpha": alpha, "seed": seed}
    # Digests of all weights and images: taken when a record is looked for or written.
    common = cache(lambda: settings_of(model, images, job) | {"precision": precision} | threat)
    found = EvalScores(len(images), said)
    if job.lasting:
        found.facts = common()
    for group in [attacks] if one_pass else [[name] for name in attacks]:
        one = _Pass(model, images, group, job, threat, common, title, one_pass)
        try:
            scores = one.run()
        except KeyboardInterrupt:
            under_way = f"{', '.join(group)}: {one.images:,} of {len(images):,} images are done"
            raise EvaluationStopped(found, under_way) from None
        found.n = scores.n
        found |= scores
        found.seconds_before += one.seconds_before
        if one.was_stored:
            found.stored += group
    return found


class _Pass:
    """One pass over the images under some attacks, continued from its record if there is one."""

    def __init__(
        self,
        model: nn.Module,
        images: EvalBatches,
        attacks: list[str],
        job: EvalJob,
        threat: dict[str, Any],
        common: Callable[[], Settings],
        title: str,
        one_pass: bool,
    ) -> None:
        self._model, self._batches, self._attacks, self._job = model, images, attacks, job
        self._threat, self._common = threat, common
        self._title, self._one_pass = title, one_pass
        self._is_kept = False
        self._began = self._kept_at = time.monotonic()
        self._tally: Tally | None = None
        self.images = 0
        self.seconds_before = 0.0
        self.was_stored = False

    @cached_property
    def _settings(self) -> Settings:
        return {"attack": ",".join(self._attacks), **self._common()}

    def run(self) -> Scores:
        """The scores; warns of what makes them too high."""
        records = self._job.records
        record = None if records.empty else records.find(self._settings)
        if record is not None:
            self._note_kept()
        if distributed.any_process(record is None, self._job.device):
            record = None
        done = None
        if record is not None:
            done = Counts(self._attacks, **{name: record[name] for name in _COUNTED})
            self.images, self.seconds_before = done.images, record["seconds"]
        self.was_stored = done is not None and done.images == len(self._batches)
        if done is not None and self.was_stored:
            counts = done
            if self._job.lasting and not records.holds_result(self._settings):
                self._finish(counts)  # interrupted between the last batch and this line
        else:
            counts = self._evaluate(done)
        for sentence in counts.remarks():
            warn(sentence)
        return counts.scores()

    def _evaluate(self, done: Counts | None) -> Counts:
        job = self._job
        name = ", ".join(self._attacks)
        with job.console.evaluating(self._title, name, self.images, len(self._batches)) as tick:

            def after(tally: Tally) -> None:
                self._tally, self.images = tally, tally.images
                tick(tally.images)
                if distributed.world_size() == 1 and time.monotonic() - self._kept_at > KEEP_EVERY:
                    self._keep(tally.counted())
                job.check_stop()

            try:
                counts = count(
                    self._model, self._batches, self._attacks, **self._threat, device=job.device,
                    shared=True, done=done, after=after,
                )  # fmt: skip
            except StopEvaluation:
                if self._tally is not None:
                    self._keep(self._tally.counted(shared=True))
                raise
            except BaseException:
                # A single process may wait for the device; of several, the others are not here.
                if self._tally is not None and distributed.world_size() == 1:
                    with suppress(Exception):
                        self._keep(self._tally.counted())
                raise
        self._finish(counts)
        return counts

    def _finish(self, counts: Counts) -> None:
        if self._one_pass:
            if self._is_kept:
                self._job.records.drop(self._settings)
        elif self._job.lasting:
            self._job.records.add(self._record(counts))
            self._job.records.drop(self._settings)
        else:
            self._keep(counts)
        distributed.wait()

    def _keep(self, counts: Counts) -> None:
        self._job.records.keep(self._record(counts), self._settings)
        self._note_kept()
        self._kept_at = time.monotonic()

    def _note_kept(self) -> None:
        self._is_kept = True
        if self._settings not in self._job.kept:
            self._job.kept.append(self._settings)

    def _record(self, counts: Counts) -> Record:
        scores = counts.scores()
        seconds = self.seconds_before + time.monotonic() - self._began
        return {
            "which": self._job.which,
            **self._settings,
            "accuracy": dict(scores),
            "interval": {name: list(scores.interval(name)) for name in scores},
            **{name: getattr(counts, name) for name in _COUNTED},
            "seconds": round(seconds, 3),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


_COUNTED = [entry.name for entry in dataclasses.fields(Counts) if entry.name != "attacks"]


def settings_of(model: nn.Module, images: EvalBatches, job: EvalJob) -> Settings:
    """What the result depends on besides the attack: another value is another evaluation.

    ``data`` is the digest of the run's data, as they are divided, and of the rows that are
    evaluated; ``images`` that of the whole set they are rows of: runs of other methods and seeds
    have the test set in common.
    """
    config, data = job.config, job.data
    network = [config.model, config.width, config.depth, *(
        getattr(config, name) for name in VARIANTS
    ), config.normalize, config.dropout]  # fmt: skip
    facts = data_facts(data)
    state = {
        name: [str(tensor.dtype), list(tensor.shape), tensor.detach().reshape(-1)]
        for name, tensor in model.state_dict().items()
    }
    content = [job.images_name, data.content, config.seed, config.val_fraction, config.limit]
    return {
        "fastadv": version("fastadv"),
        "torch": str(torch.__version__),
        "device": job.device.type,
        "weights": digest(state),
        "network": digest([network, facts, provenance.source(config.model)]),
        "data": digest([*content, images.rows]),
        "images": data.content["test data"] if job.images_name == TESTED else digest(content),
        "n": len(images),
        "batch": images.batch_size,
    }
