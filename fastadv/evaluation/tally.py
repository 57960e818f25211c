"""Attacks the batches of an evaluation and counts on the device, without waiting for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fastadv.algorithms.user_loss import UserLoss
from fastadv.engine.process import distributed
from fastadv.errors import NotFiniteError, UserError
from fastadv.evaluation.attacks import ATTACKS, inputs, searched
from fastadv.evaluation.attacks.names import OPTIONS, AttackSpec
from fastadv.evaluation.attacks.pgd_loop import ce
from fastadv.evaluation.attacks.problem import Problem
from fastadv.evaluation.attacks.watch import NO_ATTACK, Watch
from fastadv.evaluation.counts import Counts
from fastadv.evaluation.metric import Means, Metric
from fastadv.evaluation.search.cascade import Pipeline, entering
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import Rows
from fastadv.evaluation.search.search import Images
from fastadv.ranges import labels_outside, outside
from fastadv.threat import Threat

FOLLOWING_NO_LOSS = ("clean", "noise")
MASK_CHECK_IMAGES = 16  # of the first batch


class Tally:
    """Counts correctly classified images; the counts stay on the device until the end.

    ``criterion`` is what attacks maximise in place of the cross entropy, ``metric`` the value of
    each image in place of right or wrong.
    """

    def __init__(
        self,
        passes: Passes,
        threat: Threat,
        specs: dict[str, AttackSpec],
        seed: int,
        criterion: UserLoss | None = None,
        metric: Metric | None = None,
    ) -> None:
        self.passes = passes
        self.net = net = passes.network
        self.pipelines: dict[int, Pipeline] = {}  # position of an attack that searches
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
        # Rows as in ``Counts``, one column per attack.
        self.counts = torch.zeros(3, len(specs), dtype=torch.int64, device=net.device)
        self.right, self.zero_gradient, self.saturated = self.counts
        # Images or labels out of range; logits, gradients, values of the metric not finite.
        self.trouble = torch.zeros(5, dtype=torch.bool, device=net.device)
        self.masks: list[Tensor] = []  # of the first batch, as in ``Counts``
        self.commit()
        self.format = _memory_format(net.model)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Attack one batch and count its correctly classified images."""
        if len(x) == 0:
            return
        device = self.net.device
        x = inputs.plain(x).to(device, non_blocking=True)
        if x.dim() == 4:
            x = x.contiguous(memory_format=self.format)
        y = inputs.labels(y, x, any_labels=self.any_labels)
        for spec in self.specs.values():
            inputs.require_followed(spec, y, self.criterion)
        index = torch.arange(self.images, self.images + len(x), device=device)
        problem = Problem(
            self.net, self.threat, x, y, index, self.seed,
            criterion=self.criterion, any_labels=self.any_labels,
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
        self._note_trouble(x, y, clean)
        if not self.masks:
            self._check_masks(problem, clean)
        if self.net.syncs_are_free or not self.checked:
            self._raise_trouble()
            self.checked = True
        # A label out of range would abort a CUDA process here; it is reported at the end.
        if not self.any_labels and y.dim() == 1:
            problem = replace(problem, y=y.clamp(0, self.classes - 1))
        for position, spec in enumerate(self.specs.values()):
            if spec.searches:
                self._feed(position, spec, problem, clean)
                continue
            if spec.kind == "clean":
                logits = clean
            else:
                watch = Watch(device)
                logits = self._logits_under(spec, replace(problem, watch=watch))
                self.trouble[3] |= watch.bad
                self.zero_gradient[position] += watch.zero_gradient
            if self.means is not None and problem.right is None:
                values = self.means.values(logits, problem.y)
                self.trouble[4] |= ~values.isfinite().all()
                self.means.add(position, values)
            right = problem.is_right(logits)
            if right is None:
                continue
            self.right[position] += right.sum()
            if "steps" in OPTIONS[spec.kind]:
                self.saturated[position] += (right & (ce(logits, problem) == 0)).sum()
        if self.net.syncs_are_free:
            self._raise_trouble()

    def _feed(self, position: int, spec: AttackSpec, problem: Problem, clean: Tensor) -> None:
        """Give the images of ``problem`` to the searches of ``spec``, and count what is known."""
        if position not in self.pipelines:
            made = searched.stages_of(
                spec, self.threat, self.seed, self.classes, again=self.passes.confirms
            )
            self.pipelines[position] = Pipeline(made, self.passes, len(problem.x))
        images = Images(problem.x, problem.y, problem.index, clean)
        rows = entering(images, problem.index, targeted=False)
        self._count(position, self.pipelines[position].feed(rows))
        self.passes.own()

    def _count(self, position: int, results: Iterator[Rows]) -> None:
        for rows in results:
            right = ~rows["fooled"]
            self.right[position] += right.sum()
            self.zero_gradient[position] += (right & rows["flat"]).sum()

    def finish(self) -> None:
        """Search the images that still wait for a full batch."""
        for position, pipeline in self.pipelines.items():
            self._count(position, pipeline.finish())

    def _logits_under(self, spec: AttackSpec, problem: Problem) -> Tensor:
        x_adv = ATTACKS[spec.kind](problem, spec)
        with torch.no_grad():
            logits = problem.logits(x_adv)
        finite = x_adv.isfinite().all()
        self.trouble[2] |= finite & ~logits.isfinite().all()
        self.trouble[3] |= ~finite
        return logits

    @torch.no_grad()
    def _check_masks(self, problem: Problem, clean: Tensor) -> None:
        few = slice(MASK_CHECK_IMAGES)
        again = problem.logits(problem.x[few])
        apart = (again - clean[few]).abs().amax()
        changes = apart > 1e-3 * clean[few].abs().amax().clamp(min=1e-30)
        if self.any_labels:
            self.masks = [torch.zeros_like(changes), changes]
            return
        sums, largest = clean[few].sum(1), clean[few].amax(1)
        # The outputs of a softmax add up to 1; those of a sigmoid are confident one by one.
        softmax, sigmoid = (sums - 1).abs().amax() < 1e-3, largest.mean() > 0.5
        probabilities = (clean[few].amin() >= 0) & (largest.amax() <= 1) & (softmax | sigmoid)
        self.masks = [probabilities, changes]

    def _note_trouble(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        out_of_range = torch.zeros((), dtype=torch.bool, device=x.device)
        if not self.any_labels:
            self.classes = logits.shape[1]
            out_of_range = labels_outside(y, self.classes)
        not_finite = ~logits.isfinite().all()
        self.trouble[:3] |= torch.stack(
            [outside(x, *self.threat.ends(x)), out_of_range, not_finite]
        )

    def _raise_trouble(self) -> None:
        """Raise the errors recorded so far; synchronises with the device."""
        outside, out_of_range, not_finite, no_attack, no_value = self.trouble.tolist()
        if outside:
            raise UserError(inputs.box_sentence(self.threat))
        if out_of_range:
            raise UserError(
                f"Labels are out of range: the model has {self.classes} classes, so labels run "
                f"from 0 to {self.classes - 1}, and soft labels are at least 0 and sum to 1."
            )
        if not_finite:
            raise NotFiniteError(
                "The model's outputs are not finite, so its accuracy means nothing; evaluate an "
                "earlier checkpoint, or evaluate without amp."
            )
        if no_attack:
            raise NotFiniteError(NO_ATTACK)
        if no_value:
            raise NotFiniteError("The metric gave a value that is not finite; mend it.")

    def commit(self) -> None:
        """Save the counts after a complete batch; an interrupted batch does not change them."""
        self._committed = self.images, self.counts.clone()
        if self.means is not None:
            self.means.commit()

    def resume_from(self, done: Counts, *, counts: bool) -> None:
        """Continue after ``done``; ``counts``: this process adds the counts of ``done``."""
        self.images = done.images
        if counts:
            self.counts += torch.tensor(
                [done.right, done.zero_gradient, done.saturated], device=self.counts.device
            )
        self.masks = [torch.tensor(mask, device=self.net.device) for mask in done.masks]
        self.commit()

    def counted(self, *, shared: bool = False) -> Counts:
        """The counts of complete batches; with ``shared``, of all processes. Synchronises.

        Raises ``UserError`` for invalid images or labels, ``NotFiniteError`` for values that are
        not finite.
        """
        self._raise_trouble()
        images, counts = self._committed
        if shared:
            counts = counts.clone()
            distributed.add_up(counts)
        masks = [bool(mask) for mask in self.masks]
        right, zero_gradient, saturated = counts.tolist()
        return Counts(list(self.specs), images, right, zero_gradient, saturated, masks)


def _memory_format(model: nn.Module) -> torch.memory_format:
    """channels_last if the model's convolutions are, so that no pass converts its input."""
    kernels = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    # A 1x1 or one-channel kernel is contiguous in both layouts.
    informative = [w for w in kernels if math.prod(w.shape[2:]) > 1 and w.shape[1] > 1]
    if informative and all(w.is_contiguous(memory_format=torch.channels_last) for w in informative):
        return torch.channels_last
    return torch.contiguous_format
