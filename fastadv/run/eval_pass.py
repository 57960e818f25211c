"""An evaluation that shows its progress, reports its precision, and can be interrupted.

Each attack is one pass over the images. The verdicts of a pass are stored in the run folder every
few seconds and on an interruption, those of an image as soon as a search of it ends. The same
evaluation later continues from there, with the same result as without a stop, because the noise of
an image depends on its position.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastadv.declared import parse_number
from fastadv.engine.model.compiled_forward import CompiledForward
from fastadv.engine.model.precision import shown
from fastadv.engine.process import distributed, stop
from fastadv.errors import Interrupted, UserError, warn
from fastadv.evaluation.accuracy import specs_of, verdicts_of
from fastadv.evaluation.attacks.inputs import require_mode
from fastadv.evaluation.counts import Counts, by_square
from fastadv.evaluation.forecast import seconds_of_a_run
from fastadv.evaluation.found import Found
from fastadv.evaluation.ledger import Ledger
from fastadv.evaluation.scores import Scores
from fastadv.evaluation.tally import Tally
from fastadv.evaluation.verdicts import Verdicts
from fastadv.models import VARIANTS
from fastadv.printing.terminal import Terminal
from fastadv.run import provenance
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.eval_records import EvalRecords, Record
from fastadv.run.eval_watch import Deadline, Watch
from fastadv.run.example_file import ExampleFile
from fastadv.run.session import data_facts
from fastadv.run.source import EvalBatches, Source
from fastadv.run.unfinished import Settings, Unfinished
from fastadv.storage import files
from fastadv.storage.digests import digest

MARGIN = 1.1  # of a time that was measured in one part of a run


class StopEvaluation(Exception):
    """A process was asked to stop; all processes raise it."""


class EvaluationStopped(stop.Stopped):
    """The evaluation was interrupted between two saved states; ``scores`` holds the finished
    attacks, and ``under_way`` says how far the present one is."""

    def __init__(self, scores: EvalScores, under_way: str) -> None:
        super().__init__(stop.asked() or "SIGINT")
        self.scores, self.under_way = scores, under_way

    def __str__(self) -> str:
        return self.under_way

    def interrupted(self) -> Interrupted:
        """What ends a command."""
        return Interrupted(
            f"Stopped by {self.by} under {self}; the same command continues from there.", self.by
        )


class EvalScores(Scores):
    """Scores. ``on``: what the images are; ``said``: the threat and the precision; ``stored``: the
    attacks that were evaluated before; ``seconds_before``: the time that the stored results had
    taken; ``facts``: for results that last, what they depend on besides the attack; ``bounds``: for
    attacks whose time ran out, the accuracies between which theirs lies; ``known``: how many
    verdicts these rest on; ``stuck``: for those that got no further in this time, so that nothing
    new is stored, the seconds of one run of a search, and of the least time that gets further;
    ``too_short``: those that got no further either, before a pass could be timed; ``examples``:
    the files of adversarial examples."""

    def __init__(self, n: int, said: str, on: str = "images") -> None:
        super().__init__({}, n)
        self.said, self.on = said, on
        self.stored: list[str] = []
        self.seconds_before = 0.0
        self.facts: Settings = {}
        self.bounds: dict[str, tuple[float, float]] = {}
        self.known: dict[str, int] = {}
        self.stuck: dict[str, tuple[float, float]] = {}
        self.too_short: set[str] = set()
        self.examples: dict[str, Path] = {}

    def unfinished(self, of: str) -> Iterator[str]:
        """Sentences for each attack whose time ran out; ``of``: what was evaluated."""
        for attack, (low, high) in self.bounds.items():
            goes_on = "." if attack in self.stuck else ", and the same command continues."
            if attack in self.too_short:
                goes_on = "; nothing new could be stored in this time: give a longer --time-limit."
            yield (
                f"{of}, {attack}: the time ended with {self.known[attack]:,} of {self.n:,} "
                f"verdicts; the accuracy is between {100 * low:.2f} and {100 * high:.2f} %{goes_on}"
            )
            if attack in self.stuck:
                run, least = self.stuck[attack]
                yield (
                    f"{of}, {attack}: nothing new could be stored, as no search came to the end of "
                    f"a run, which takes about {run:.1f} s; the same command gets further with "
                    f"--time-limit {math.ceil(least / 6) / 10:g} or more (minutes)."
                )


@dataclass
class EvalJob:
    """What is evaluated. ``which`` names the weights in messages.

    ``lasting``: each attack's result is a line in evaluations.jsonl. Otherwise results are stored
    only to continue an interrupted evaluation, until the run has its summary. ``asked_to_stop`` is
    called between two steps, and ends the evaluation in all processes if it is true in one;
    ``deadline`` ends it in time. ``search_dtype`` and ``mode`` are those of ``fastadv.evaluate``;
    results of different modes differ by rounding, so one continues or replaces that of another.
    """

    config: RunConfig
    data: Source
    device: torch.device
    records: EvalRecords
    which: str = "weights"
    console: Console = field(default_factory=lambda: Console(Terminal(quiet=True)))
    asked_to_stop: Callable[[], bool] = lambda: False
    lasting: bool = False
    saves_examples: bool = False
    search_dtype: str = "float32"
    mode: str = "auto"
    deadline: Deadline = field(default_factory=Deadline)


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
    ``fastadv.evaluate`` does, ``StopEvaluation`` when asked to stop, and ``EvaluationStopped`` for
    a signal.
    """
    alpha = None if alpha is None else parse_number(alpha, "alpha")
    require_mode(job.mode, job.device)  # also where all results are stored
    specs = specs_of(attacks, alpha)
    attacks = list(specs)
    precision = shown(None, model, job.device)
    if job.search_dtype != "float32":
        precision += f", searched in {job.search_dtype}"
    said = f"{job.config.norm} eps {eps:.4g}, evaluated in {precision}"
    if images.wrong_labels:
        said += f", with the labels trained on ({images.label_noise})"
    title = (
        f"evaluating {job.which} on {len(images):,} {images.name} under {', '.join(attacks)}: "
        f"{job.config.norm} eps {eps:.4g}, {precision}"
    )
    if job.mode != "auto":
        title += f", {job.mode}"
    threat: dict[str, Any] = {"eps": float(eps), "norm": job.config.norm}
    threat |= {"seed": seed, "search_dtype": job.search_dtype}
    # Digests of all weights and images: taken when a record is looked for or written.
    common = cache(lambda: settings_of(model, images, job) | {"precision": precision} | threat)
    found = EvalScores(len(images), said, images.name)
    if job.lasting:
        found.facts = common()
    if not len(images):
        raise UserError(f"There are no images to evaluate: the {images.name} are none.")
    anything_new = False
    compiled = CompiledForward()  # once for all attacks
    for group in [attacks] if one_pass else [[name] for name in attacks]:
        # One that an attack does not follow is no part of its settings: the verdicts are the same.
        step = alpha if any(specs[name].follows_alpha for name in group) else None
        own = threat | {"alpha": step}
        one = _Pass(model, images, group, job, own, common, title, one_pass, compiled)
        try:
            scores = one.run()
        except (KeyboardInterrupt, stop.Stopped):
            under_way = f"{', '.join(group)}: {one.images:,} of {len(images):,} images are done"
            raise EvaluationStopped(found, under_way) from None
        anything_new = anything_new or one.got_further
        if isinstance(scores, Found):
            for name, ledger in scores.ledgers.items():
                found.bounds[name] = ledger.bounds(len(images))
                found.known[name] = int(ledger.known.sum())
                if anything_new:
                    continue
                if one.stuck is None:
                    found.too_short.add(name)
                else:
                    found.stuck[name] = one.stuck
            continue
        found |= scores
        found.verdicts |= scores.verdicts
        found.seconds_before += one.seconds_before
        found.examples |= one.saved_examples
        if one.was_stored:
            found.stored += group
    return found


class _Pass:
    """One pass over the images under some attacks, continued where it was interrupted."""

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
        compiled: CompiledForward,
    ) -> None:
        self._model, self._batches, self._attacks, self._job = model, images, attacks, job
        self._threat, self._common = threat, common
        self._title, self._one_pass, self._compiled = title, one_pass, compiled
        self._is_kept = False
        self._began = time.monotonic()
        self._tally: Tally | None = None
        self._before: Mapping[str, Ledger] = {}  # what was stored before
        self._examples: dict[str, ExampleFile] = {}
        self.saved_examples: dict[str, Path] = {}
        self._unfinished = Unfinished(job.records.folder.unfinished, of_run=not job.lasting)
        self._watch: Watch | None = None
        self._images = 0
        self.seconds_before = 0.0
        self.was_stored = False
        self.got_further = False

    @property
    def stuck(self) -> tuple[float, float] | None:
        """The seconds of one run of its search, and of the least time limit for one; None if no
        search was at work."""
        if self._tally is None or not self._tally.pipelines:
            return None
        (name, pipeline), *_ = self._tally.pipelines.items()
        left = len(self._batches) - int(self._tally.ledgers[name].known.sum())
        run = seconds_of_a_run(pipeline, -(-left // distributed.world_size()))
        if math.isnan(run):
            return None
        elapsed = self._job.deadline.elapsed
        others = elapsed - sum(engine.seconds for engine in pipeline.engines)
        return run, MARGIN * max(elapsed, others + run)

    @property
    def images(self) -> int:
        """The number of images with verdicts."""
        return self._images if self._watch is None else self._watch.images

    @cached_property
    def _settings(self) -> Settings:
        own = {"attack": ",".join(self._attacks), "alpha": self._threat["alpha"]}
        return own | self._common()

    @cached_property
    def _kept_settings(self) -> Settings:
        """Those of the verdicts so far: only with examples can they be continued with examples."""
        return {**self._settings, "examples": bool(self._examples)}

    def run(self) -> Scores | Found:
        """The scores; warns of what makes them too high. What was found, if the time ran out."""
        stored = self._stored()
        if stored is not None:
            counts, verdicts = stored
        else:
            found = self._found()
            if not self._is_whole(found):
                return found
            counts = found.counts()
            verdicts = self._finish(found)
        for sentence in counts.remarks():
            warn(sentence)
        scores = counts.scores()
        scores.verdicts.update(verdicts)
        return scores

    def _stored(self) -> tuple[Counts, dict[str, Verdicts]] | None:
        """The result of an earlier evaluation."""
        job, records = self._job, self._job.records
        saves = job.saves_examples and self._attacks != ["clean"]
        stored = None
        if job.lasting and not records.empty:
            stored = records.find(self._settings, examples=saves)
        if job.lasting and distributed.any_process(stored is None, job.device):
            stored = None
        if stored is None:
            if saves:
                place = records.place_for(self._settings, job.which)
                files.make_folder(place.parent)
                path = place.with_name(place.stem + ".examples.npy")
                self._examples = {self._attacks[0]: ExampleFile(path, len(self._batches))}
            return None
        record, verdicts = stored
        self.was_stored, self.seconds_before = True, record["seconds"]
        if saves:
            self.saved_examples[self._attacks[0]] = records.folder.path / record["examples"]
        counted = {name: record[name] for name in _COUNTED}
        squares = [by_square(verdicts.stages, verdicts.fooled_by)]
        counts = Counts(self._attacks, **counted, by_square=squares)
        return counts, {self._attacks[0]: verdicts}

    def _found(self) -> Found:
        """What is found, with what was found before."""
        kept = None if self._unfinished.empty else self._unfinished.find(self._kept_settings)
        if kept is not None:
            self._is_kept = True
        found = None if kept is None else kept.found
        whole = found is not None and self._is_whole(found)
        if kept is None or not all(each.has_begun(whole) for each in self._examples.values()):
            found, whole = None, False
        if kept is not None and found is not None:
            self.seconds_before = kept.seconds
            self._images = min(int(each.known.sum()) for each in found.ledgers.values())
        elsewhere_not = distributed.any_process(not whole, self._job.device)
        if found is not None and not elsewhere_not:
            self.was_stored = True
            return found
        return self._evaluate(found)

    def _is_further(self, found: Found) -> bool:
        """True if ``found`` has more than what was stored before this pass; the command then gets
        on."""
        further = any(
            ledger.is_further_than(self._before.get(name)) for name, ledger in found.ledgers.items()
        )
        if further:
            stop.note_progress()
        return further

    def _is_whole(self, found: Found) -> bool:
        """True if every image has its verdict."""
        total = len(self._batches)
        return all(len(each) == total and each.known.all() for each in found.ledgers.values())

    def _evaluate(self, done: Found | None) -> Found:
        job = self._job
        name, total = ", ".join(self._attacks), len(self._batches)
        self._before = {} if done is None else done.ledgers
        with job.console.evaluating(self._title, name, self.images, total) as tick:
            self._watch = watch = Watch(job.asked_to_stop, job.deadline, self._keep, tick, total)

            def look(tally: Tally, *, after: bool) -> None:
                self._tally = tally
                watch.look(tally, after=after)

            # One process that is told to stop does not wait for the end of a long pass; of several
            # the others would wait for this one.
            alone = distributed.world_size() == 1
            try:
                with stop.interruptible() if alone else nullcontext():
                    found = verdicts_of(
                        self._model, self._batches, self._attacks, **self._threat,
                        device=job.device, shared=True, mode=job.mode, compiled=self._compiled,
                        done=done, after=lambda tally: look(tally, after=True),
                        between=lambda tally: look(tally, after=False), examples=self._examples,
                    )  # fmt: skip
            except BaseException:
                if self._tally is not None:
                    with suppress(Exception):
                        self._keep(self._tally)
                raise
        for examples in self._examples.values():
            examples.settle()
        self.got_further = self._is_further(found)
        if not self._is_whole(found):
            if distributed.rank() == 0 and found.images:
                self._store(found)
            if not distributed.any_process(job.deadline.is_over, job.device):
                raise StopEvaluation
        return found

    def _finish(self, found: Found) -> dict[str, Verdicts]:
        """Store the result; the verdicts by attack."""
        job = self._job
        verdicts: dict[str, Verdicts] = {}
        if job.lasting:
            distributed.wait()  # all processes have written their examples
            facts = self._settings | {"images": self._settings["image_set"], "which": job.which}
            for name in self._attacks:
                index = self._batches.rows.numpy()
                told = found.verdicts(name, facts | {"attack": name}, index)
                if told is not None:
                    verdicts[name] = told
            self._add_result(found, verdicts)
        if self._one_pass or job.lasting:
            if self._is_kept or not self._unfinished.empty:
                self._unfinished.drop(self._kept_settings)
        elif not self.was_stored and distributed.rank() == 0:
            self._store(found)
        distributed.wait()
        return verdicts

    def _add_result(self, found: Found, verdicts: dict[str, Verdicts]) -> None:
        """The line in evaluations.jsonl, and the files that it names."""
        records, name = self._job.records, self._attacks[0]
        record = self._record(found.counts())
        for examples in self._examples.values():
            try:
                examples.finish()
                record["examples"] = str(examples.path.relative_to(records.folder.path))
                self.saved_examples[name] = examples.path
            except OSError as error:
                records.warn(error)
        records.add(record, verdicts[name], records.place_for(self._settings, self._job.which))

    def _keep(self, tally: Tally) -> None:
        """Store what this process has found. Waits for the device."""
        found = tally.found()
        for examples in self._examples.values():
            examples.settle()
        self._store(found)

    def _store(self, found: Found) -> None:
        seconds = self.seconds_before + time.monotonic() - self._began
        self._is_kept = True
        try:
            self._unfinished.keep(self._kept_settings, found, seconds, len(self._batches))
        except (OSError, UserError) as error:
            self._job.records.warn(error)
        else:
            self._is_further(found)

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


_COUNTED = [
    entry.name
    for entry in dataclasses.fields(Counts)
    if entry.name not in ("attacks", "by_square")  # the second is in the verdicts
]


def digest_of_weights(model: nn.Module) -> str:
    return digest(
        {
            name: [str(tensor.dtype), list(tensor.shape), tensor.detach().reshape(-1)]
            for name, tensor in model.state_dict().items()
        }
    )


def settings_of(model: nn.Module, images: EvalBatches, job: EvalJob) -> Settings:
    """What the result depends on besides the attack: another value is another evaluation.

    ``evaluated_on`` says what the images are. ``image_set`` is the digest of the whole set, which
    other runs may have in common, as those of other methods and seeds have the test set, and
    ``data`` that of the rows of it that are evaluated.
    """
    config = job.config
    network = [config.model, config.width, config.depth, *(
        getattr(config, name) for name in VARIANTS
    ), config.normalize, config.dropout]  # fmt: skip
    facts = data_facts(job.data)
    return {
        "fastadv": version("fastadv"),
        "torch": str(torch.__version__),
        "device": job.device.type,
        "weights": digest_of_weights(model),
        "network": digest([network, facts, provenance.source(config.model)]),
        "evaluated_on": images.name,
        "data": digest([images.content, images.rows]),
        "image_set": images.content,
        "n": len(images),
        "batch": images.batch_size,
    }
