"""``fastadv train --dry-run``: a few steps and evaluated batches of a run, timed, nothing written.

The steps are those of the last epochs, in which every part of the method is active: an upper bound
for a method that warms up.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from fastadv.by_epoch import Phases
from fastadv.data import LoaderBatch
from fastadv.data.array_file import writing_nothing
from fastadv.engine.model.precision import tf32
from fastadv.engine.process import memory
from fastadv.engine.process.determinism import reproducible
from fastadv.errors import UserError
from fastadv.evaluation.accuracy import evaluate, specs_of
from fastadv.evaluation.attacks.names import AttackSpec
from fastadv.run.config import RunConfig
from fastadv.run.console import Console
from fastadv.run.fitting import AUTO, fitted
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.session import Session
from fastadv.run.source import EvalBatches

NOT_COUNTED = 3  # first steps, which allocate, compile and record
MOST_STEPS, LEAST_STEPS = 20, 3
SECONDS = 10.0  # after which no further step is begun
MOST_PASSES = 200  # of an attack that is tried on one batch


@dataclass
class Stage:
    """Epochs with images of one size: how many, and the seconds of each step that was timed."""

    epochs: int
    seconds: list[float]

    def quantile(self, share: float) -> float:
        """Seconds of a step that ``share`` of the timed ones did not exceed."""
        return float(torch.tensor(self.seconds, dtype=torch.float64).quantile(share))


@dataclass
class Rehearsal:
    """What was measured. ``batches`` of an epoch; ``evaluated``: name of a set of images ->
    seconds of one evaluation of it, estimated from one batch; ``not_included``: attacks that would
    take too long to try. ``peak``: bytes in use at most."""

    session: Session
    batches: int
    stages: list[Stage] = field(default_factory=list)
    evaluated: dict[str, float] = field(default_factory=dict)
    not_included: list[str] = field(default_factory=list)
    peak: int | None = None

    def training(self, share: float) -> float:
        """Seconds of training if each step took as long as this ``share`` of the timed ones."""
        return sum(each.epochs * self.batches * each.quantile(share) for each in self.stages)

    def evaluation(self) -> float:
        """Seconds of all evaluations, without ``not_included``; the test is of two networks."""
        config, found = self.session.config, self.evaluated
        often = -(-config.epochs // config.eval_every)
        each = found.get(config.select, 0.0) + found.get("train", 0.0)
        return often * each + 2 * found.get("final", 0.0)


def with_batch(request: RunRequest) -> RunConfig:
    """The configuration of ``request``; where it asks for a batch that fits, with the one that was
    measured, which is said. Nothing is written or downloaded; raises as ``rehearse``."""
    _require_one_process()
    config = resolve_run(request)
    if config.batch_size != AUTO:
        return config
    with writing_nothing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fitted(replace(request, download=False), Console())
    return replace(config, batch_size=found.batch_size)


def _require_one_process() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("--dry-run measures one process: start it without torchrun.")


@contextmanager
def prepared(config: RunConfig) -> Iterator[Session]:
    """Inside, the run of ``config``, which has a batch size, is in memory, and nothing is written
    or downloaded.

    Raises ``UserError`` as the run would, and under torchrun.
    """
    _require_one_process()
    with writing_nothing(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a fresh network is not judged
        yield Session.build(replace(config, download=False))


def chosen(session: Session) -> dict[str, str]:
    """Setting -> what a run takes that has it "auto"."""
    config = session.config
    found = {"device": str(session.device), "mode": config.mode, "fused_norm": config.fused_norm}
    return found | {"loader": "dali" if session.data.streams else "device"}


def rehearse(session: Session) -> Rehearsal:
    """Measure some steps of the run that is ``prepared``. Raises ``UserError`` as the run would."""
    config = session.config
    found = Rehearsal(session, len(session.data.loader))
    if session.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(session.device)
    with reproducible(config.deterministic), tf32(config.tf32):
        found.stages = [_stage(session, epochs) for epochs in _by_size(config)]
        _evaluate(session, found)
    found.peak = _peak(session.device)
    return found


def _by_size(config: RunConfig) -> list[list[int]]:
    """The epochs that have images of one size, for each size."""
    epochs = range(config.epochs)
    if not isinstance(config.image_sizes, Phases):
        return [list(epochs)]
    groups: dict[float, list[int]] = {}
    for epoch in epochs:
        groups.setdefault(config.image_sizes.at(epoch), []).append(epoch)
    return list(groups.values())


def _stage(session: Session, epochs: list[int]) -> Stage:
    step, device = session.step, session.device
    batches = len(session.data.loader)
    step.internals.clock.calls = epochs[-1] * batches
    step.internals.forget_shapes()
    session.model.train()
    seconds: list[float] = []
    counted = -NOT_COUNTED
    began = before = time.perf_counter()
    for batch in _batches(session, epochs[-1]):
        second = None if batch.second is None else batch.second[0]
        step(batch.image, batch.label, batch.index, view=batch.view, second=second)
        step.internals.clock.calls = epochs[-1] * batches  # never past the end of the run
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        now = time.perf_counter()  # waiting for the loader counts
        counted += 1
        if counted > 0:
            seconds.append(now - before)
        elif counted == 0:
            began = now
        before = now
        enough = counted >= LEAST_STEPS and now - began > SECONDS
        if enough or counted >= MOST_STEPS:
            break
    step.check()
    return Stage(len(epochs), seconds)


def _batches(session: Session, epoch: int) -> Iterator[LoaderBatch]:
    """Training batches of ``epoch`` without an end; short last ones are left out."""
    full = 0
    while True:
        for batch in session.data.loader.epoch(epoch):
            full = full or len(batch.label)
            if len(batch.label) == full:
                yield batch
        if not full:
            raise UserError("There are no training images.")


def _evaluate(session: Session, found: Rehearsal) -> None:
    config, data = session.config, session.data
    each_epoch = ["clean", config.select_attack]
    sets: list[tuple[str, EvalBatches, list[str]]]
    sets = [(config.select, data.validation, each_epoch)]
    if config.eval_train is not None:
        sets.append(("train", data.training.limited(config.eval_train), each_epoch))
    sets.append(("final", data.test, config.test_attacks.split(",")))
    for name, images, attacks in sets:
        specs = specs_of(list(dict.fromkeys(attacks)), None)
        tried = [attack for attack, spec in specs.items() if _passes(spec) <= MOST_PASSES]
        found.not_included += [attack for attack in specs if attack not in tried]
        found.evaluated[name] = _seconds(session, images, tried) if tried and len(images) else 0.0
    found.not_included = list(dict.fromkeys(found.not_included))


def _passes(spec: AttackSpec) -> int:
    """Passes that an attack takes for an image at most; those of searches are not tried."""
    if spec.only_searches:
        return MOST_PASSES + 1
    return (spec.steps or 20) * (spec.restarts or 1)


def _seconds(session: Session, images: EvalBatches, attacks: list[str]) -> float:
    """Seconds of an evaluation of ``images``, from one batch."""
    config = session.config
    x, y = next(iter(images))
    session.model.eval()
    began = time.perf_counter()
    evaluate(
        session.model,
        [(x, y)],
        attacks,
        eps=config.eps,
        norm=config.norm,
        alpha=config.eval_alpha,
        seed=config.seed,
    )
    if session.device.type == "cuda":
        torch.cuda.synchronize(session.device)
    return (time.perf_counter() - began) * len(images) / len(y)


def _peak(device: torch.device) -> int | None:
    """Bytes at most in use so far: of the allocator on CUDA, else of the process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_reserved(device))
    return memory.peak()
