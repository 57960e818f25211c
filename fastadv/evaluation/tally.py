"""Attacks the batches of an evaluation and notes the verdicts, without waiting for the device."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from fastadv.algorithms.user_loss import UserLoss
from fastadv.engine.process import distributed
from fastadv.errors import UserError
from fastadv.evaluation.attacks import ATTACKS, inputs, searched
from fastadv.evaluation.attacks.masks import masks_of
from fastadv.evaluation.attacks.names import BATCHWISE, OPTIONS, AttackSpec
from fastadv.evaluation.attacks.pgd_loop import ce
from fastadv.evaluation.attacks.problem import Problem
from fastadv.evaluation.attacks.watch import Watch
from fastadv.evaluation.found import Found
from fastadv.evaluation.ledger import OPEN, RIGHT, Ledger
from fastadv.evaluation.metric import Means, Metric
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.cascade import FOOLED_BY, PASSED, Pipeline, entering
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import Rows, chosen
from fastadv.evaluation.search.search import Images, choose
from fastadv.evaluation.trouble import Trouble
from fastadv.ranges import hard
from fastadv.threat import Threat

FOLLOWING_NO_LOSS = ("clean", "noise")
_CARRIED = {"passed": "i8", "runs": "i8", "margin": "f8", "strength": "f8", "flat": "?"}


class Halt(Exception):
    """Raised between two steps to end an evaluation with the verdicts so far."""


class Sink(Protocol):
    """Where adversarial examples go."""

    def put(self, place: Tensor, x_adv: Tensor) -> None:
        """Keep ``x_adv`` (n,...) of the images at ``place`` (n,)."""

    def get(self, place: np.ndarray) -> Tensor:
        """What was kept of the images at ``place`` (n,)."""


class Tally:
    """The verdicts of several attacks, image by image, in a ``Ledger`` for each.

    ``criterion`` is what attacks maximise in place of the cross entropy, ``metric`` the value of
    each image in place of right or wrong. ``done``: ledgers of an earlier evaluation, which is
    continued. ``examples``: where the adversarial examples of an attack go.
    """

    def __init__(
        self,
        passes: Passes,
        threat: Threat,
        specs: dict[str, AttackSpec],
        seed: int,
        criterion: UserLoss | None = None,
        metric: Metric | None = None,
        done: Mapping[str, Ledger] | None = None,
        examples: Mapping[str, Sink] | None = None,
    ) -> None:
        self.passes = passes
        self.net = net = passes.network
        self.pipelines: dict[str, Pipeline] = {}  # by the attack that searches
        self.criterion = criterion
        self.means = None if metric is None else Means(metric, len(specs), net.device)
        # Without an attack that follows a loss the metric alone says what y may be.
        follows = any(spec.kind not in FOLLOWING_NO_LOSS for spec in specs.values())
        self.any_labels = criterion is not None or (metric is not None and not follows)
        self.threat = threat
        self.specs = specs
        self.seed = seed
        self.images = 0
        self.checked = False
        self.classes = 0
        self.ledgers = {
            name: Ledger.union([done[name]] if done is not None else []) for name in specs
        }
        self.examples = examples or {}
        self.stages = {
            name: _stages(part.name for part in spec.searches) if spec.searches else [name]
            for name, spec in specs.items()
        }
        self.halted = False
        self.trouble = Trouble(threat, net.device)
        self.masks: list[Tensor] = []  # of the first batch, as in ``Counts``
        self.commit()
        self.format = _memory_format(net.model)

    def lacks(self, count: int) -> dict[str, AttackSpec]:
        """The attacks for which verdicts on the next ``count`` images are missing."""
        places = range(self.images, self.images + count)
        return {
            name: spec
            for name, spec in self.specs.items()
            if not self.ledgers[name].is_known(places).all()
        }

    def add(self, x: Tensor, y: Tensor) -> None:
        """Attack one batch: the images that follow the ``images`` before it. Attacks whose verdicts
        are all known are left out."""
        specs = self.lacks(len(x))
        places = range(self.images, self.images + len(x))
        device = self.net.device
        x = inputs.plain(x).to(device, non_blocking=True)
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.format)
        y = inputs.labels(y, x, any_labels=self.any_labels)
        for spec in specs.values():
            inputs.require_followed(spec, y, self.criterion)
        index = torch.arange(places.start, places.stop, device=device)
        # A process alone finishes the batch, or is interrupted in a long one.
        alone = distributed.world_size() == 1
        between = (lambda: None) if alone else self.passes.between
        problem = Problem(
            self.net, self.threat, x, y, index, self.seed,
            criterion=self.criterion, any_labels=self.any_labels, between=between,
        )  # fmt: skip
        self.passes.prepare(x)
        self.passes.own()
        with torch.no_grad():
            clean = problem.logits(x)
        if self.means is not None:
            if self.means.values(clean, y).dtype == torch.bool:
                problem = replace(problem, right=self.means.values)
        elif problem.is_right(clean) is None:
            raise UserError(
                "Accuracy is of classes, and y are none: pass metric=, a function of logits and y "
                "with a bool or float value per image."
            )
        self.trouble.look_at_images(x)
        self.trouble.look_at_outputs(clean, index)
        if not self.any_labels:
            self.classes = clean.shape[1]
            self.trouble.look_at_labels(y, self.classes)
        if not self.masks:
            self.masks = masks_of(problem, clean)
        if self.net.syncs_are_free or not self.checked:
            self.trouble.raise_found()
            self.checked = True
        # A label out of range would abort a CUDA process here; it is reported at the end.
        if not self.any_labels and y.dim() == 1:
            problem = replace(problem, y=y.clamp(0, self.classes - 1))
        classes = None if problem.is_right(clean) is None else _classes(problem.y, clean)
        for name, spec in specs.items():
            self.ledgers[name].expect(places)
            if classes is not None:
                self.ledgers[name].put(index, label=classes.int())
            if self._searches(spec, problem.y):
                self._feed(name, spec, problem, clean)
            else:
                self._attack(name, spec, problem, clean, classes)
        if self.net.syncs_are_free:
            self.trouble.raise_found()

    def _searches(self, spec: AttackSpec, y: Tensor) -> bool:
        """True if ``spec`` runs as searches, which need the accuracy of classes ``y`` (B,)."""
        plain = self.criterion is None and self.means is None and y.dim() == 1
        return spec.only_searches or (bool(spec.searches) and plain)

    def _attack(
        self, name: str, spec: AttackSpec, problem: Problem, clean: Tensor, classes: Tensor | None
    ) -> None:
        """Attack the images of ``problem`` as one batch and note the verdicts."""
        x_adv, logits, flat = problem.x, clean, None
        if spec.kind != "clean":
            watch = Watch(self.net.device)
            x_adv, logits = self._logits_under(spec, replace(problem, watch=watch))
            self.trouble.no_attack(watch.bad)
            flat = watch.flat
        if name in self.examples:
            self.examples[name].put(problem.index, x_adv)
        if self.means is not None and problem.right is None:
            values = self.means.values(logits, problem.y)
            self.trouble.look_at_values(values)
            self.means.add(list(self.specs).index(name), values)
        right = problem.is_right(logits)
        if right is None:
            return
        stage = len(self.stages[name]) - 1
        found = {"fooled_by": torch.where(right, RIGHT, stage).to(torch.int16)}
        if classes is not None:
            found["margin"] = losses.lead(logits, classes)
        if flat is not None:
            found["flat"] = flat
        if "steps" in OPTIONS[spec.kind]:
            found["saturated"] = right & (ce(logits, problem) == 0)
        self.ledgers[name].put(problem.index, **found)

    def spares(self, name: str) -> bool:
        """True if the attack leaves alone the images that are wrong without it. PGD by itself
        attacks all, as in the papers."""
        return self.specs[name].kind not in BATCHWISE

    def _feed(self, name: str, spec: AttackSpec, problem: Problem, clean: Tensor) -> None:
        """Give the images of ``problem`` without a verdict to the searches of ``spec``."""
        ledger = self.ledgers[name]
        if name not in self.pipelines:
            made = searched.stages_of(
                spec, self.threat, self.seed, self.classes, again=self.passes.confirms
            )
            self.stages[name] = _stages(stage.name for stage in made)
            self.pipelines[name] = Pipeline(
                made, self.passes, len(problem.x), ended=lambda rows: self._note(name, rows)
            )
        images = Images(problem.x, problem.y, problem.index, clean)
        rows = entering(images, problem.index, targeted=False, spares=self.spares(name))
        rows = self._continued(name, rows, ledger.of(self.images, len(problem.x)))
        self._note(name, chosen(rows, rows["fooled"]))
        for _ in self.pipelines[name].feed(chosen(rows, ~rows["fooled"])):
            pass  # noted when they fell
        self.passes.own()

    def _continued(self, name: str, rows: Rows, known: np.ndarray) -> Rows:
        """``rows`` without those that have a verdict, the others as the searches left them that
        they have passed. ``known``: the ledger of ``rows``."""
        if not (known["passed"] | known["runs"]).any() and not (known["fooled_by"] >= RIGHT).any():
            return rows
        left = np.flatnonzero(known["fooled_by"] < RIGHT)
        before = {
            column: torch.from_numpy(known[column][left].astype(kind)).to(self.net.device)
            for column, kind in _CARRIED.items()
        }
        rows = chosen(rows, torch.from_numpy(left).to(self.net.device))
        passed, runs = before.pop("passed"), before.pop("runs")
        begun = (passed > 0) | (runs > 0)
        if name in self.examples:
            before["found"] = self.examples[name].get(left + self.images)
        for column, values in before.items():
            rows[column] = choose(begun, values.to(rows[column]), rows[column])
        return rows | {PASSED: passed, "segment": runs}

    def _note(self, name: str, rows: Rows) -> None:
        """Note in the ledger that a search, or a run of it, has ended for ``rows``, or that none
        was needed."""
        fooled, stages = rows["fooled"], len(self.stages[name]) - 1
        ends = fooled | (rows[PASSED] == stages)
        if name in self.examples:  # first: a verdict says that there is an example
            self.examples[name].put(rows["place"], rows["found"])
        self.ledgers[name].put(
            rows["place"],
            fooled_by=torch.where(ends, rows[FOOLED_BY], OPEN).to(torch.int16),
            passed=rows[PASSED].to(torch.int16),
            runs=rows["segment"].to(torch.int16),
            margin=rows["margin"],
            strength=rows["strength"],
            flat=~fooled & rows["flat"],
            saturated=~fooled & self._is_saturated(name, rows["strength"]),
        )

    def _is_saturated(self, name: str, strength: Tensor) -> Tensor:
        """(n,) bool: the one search of the attack maximised the cross entropy, and it is exactly
        0."""
        spec = self.specs[name]
        follows_ce = spec.kind == "pgd" and spec.objective in (None, "ce")
        return (strength == 0) & follows_ce

    def finish(self) -> None:
        """Search the images that still wait for a full batch."""
        for pipeline in self.pipelines.values():
            for _ in pipeline.finish():
                pass  # noted when they fell

    def _logits_under(self, spec: AttackSpec, problem: Problem) -> tuple[Tensor, Tensor]:
        """The adversarial images and their logits."""
        x_adv = ATTACKS[spec.kind](problem, spec)
        with torch.no_grad():
            logits = problem.logits(x_adv)
        self.trouble.look_at_outputs(logits, problem.index, x_adv)
        return x_adv, logits

    def commit(self) -> None:
        """Save the sums of the metric after a complete batch; an interrupted batch does not change
        them."""
        if self.means is not None:
            self.means.commit()

    def resume_from(self, done: Found) -> None:
        """Take over what an earlier part of this evaluation saw of the network."""
        self.masks = [torch.tensor(mask, device=self.net.device) for mask in done.masks]
        self.stages |= done.stages

    @property
    def known(self) -> int:
        """The number of images with verdicts under all attacks."""
        return min(int(ledger.known.sum()) for ledger in self.ledgers.values())

    def found(self, *, shared: bool = False) -> Found:
        """The verdicts so far; with ``shared``, those of all processes. Synchronises.

        Raises ``UserError`` for invalid images or labels, ``NotFiniteError`` for values that are
        not finite.
        """
        for ledger in self.ledgers.values():
            ledger.settle()
        self.trouble.raise_found()  # of all that the ledgers hold
        ledgers, images, halted = self.ledgers, self.images, self.halted
        stages: Mapping[str, list[str]] = self.stages
        if shared and distributed.world_size() > 1:
            ledgers = {
                name: Ledger.union(map(Ledger.unpacked, distributed.every_part(ledger.packed())))
                for name, ledger in ledgers.items()
            }
            halted = distributed.any_process(halted, self.net.device)
            images = max(images, *map(len, ledgers.values()))
            told = distributed.every_part(json.dumps(stages).encode())
            # A process without images has not seen which searches there are in the end.
            stages = max(map(json.loads, told), key=lambda each: sum(map(len, each.values())))
        masks = [bool(mask) for mask in self.masks]
        return Found(ledgers, stages, images, masks, halted)


def _stages(names: Iterable[str]) -> list[str]:
    """What can fool the network in a cascade of searches with these ``names``, each with its own:
    the image itself, and the searches."""
    return searched.numbered(["clean", *names])


def _classes(y: Tensor, logits: Tensor) -> Tensor | None:
    """The classes (B,) that ``y`` names; None if it names none of the network's."""
    return hard(y) if y.dim() in (1, 2) and logits.dim() == 2 else None


def _memory_format(model: nn.Module) -> torch.memory_format:
    """channels_last if the model's convolutions are, so that no pass converts its input."""
    kernels = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    # A 1x1 or one-channel kernel is contiguous in both layouts.
    informative = [w for w in kernels if math.prod(w.shape[2:]) > 1 and w.shape[1] > 1]
    if informative and all(w.is_contiguous(memory_format=torch.channels_last) for w in informative):
        return torch.channels_last
    return torch.contiguous_format
