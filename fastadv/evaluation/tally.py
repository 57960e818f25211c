"""Attacks the batches of an evaluation and counts on the device, without waiting for it."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fastadv.engine.model.network import Network
from fastadv.engine.process import distributed
from fastadv.errors import NotFiniteError, UserError
from fastadv.evaluation.attacks import ATTACKS, inputs
from fastadv.evaluation.attacks.names import OPTIONS, AttackSpec
from fastadv.evaluation.attacks.problem import Problem
from fastadv.evaluation.attacks.watch import NO_ATTACK, Watch
from fastadv.evaluation.counts import Counts
from fastadv.ranges import outside
from fastadv.threat import Threat

MASK_CHECK_IMAGES = 16  # of the first batch


class Tally:
    """Counts correctly classified images; the counts stay on the device until the end."""

    def __init__(
        self, net: Network, threat: Threat, specs: dict[str, AttackSpec], seed: int
    ) -> None:
        self.net = net
        self.threat = threat
        self.specs = specs
        self.seed = seed
        self.images = 0
        self.checked = False
        self.classes = 0
        # Rows as in ``Counts``, one column per attack.
        self.counts = torch.zeros(3, len(specs), dtype=torch.int64, device=net.device)
        self.right, self.zero_gradient, self.saturated = self.counts
        # Images or labels out of range, logits not finite, gradients not finite.
        self.trouble = torch.zeros(4, dtype=torch.bool, device=net.device)
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
        y = inputs.plain(y).to(device, torch.int64, non_blocking=True)
        index = torch.arange(self.images, self.images + len(x), device=device)
        problem = Problem(self.net, self.threat, x, y, index, self.seed)
        with torch.no_grad():
            clean = problem.logits(x)
        self.classes = clean.shape[1]
        self._note_trouble(x, y, clean)
        if not self.masks:
            self._check_masks(problem, clean)
        if self.net.syncs_are_free or not self.checked:
            self._raise_trouble()
            self.checked = True
        # A label out of range would abort a CUDA process here; it is reported at the end.
        problem = replace(problem, y=y.clamp(0, self.classes - 1))
        for position, spec in enumerate(self.specs.values()):
            if spec.kind == "clean":
                logits = clean
            else:
                watch = Watch(device)
                logits = self._logits_under(spec, replace(problem, watch=watch))
                self.trouble[3] |= watch.bad
                self.zero_gradient[position] += watch.zero_gradient
            right = logits.argmax(1) == problem.y
            self.right[position] += right.sum()
            if "steps" in OPTIONS[spec.kind]:
                loss = cross_entropy(logits, problem.y, reduction="none")
                self.saturated[position] += (right & (loss == 0)).sum()
        if self.net.syncs_are_free:
            self._raise_trouble()

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
        sums, largest = clean[few].sum(1), clean[few].amax(1)
        # The outputs of a softmax add up to 1; those of a sigmoid are confident one by one.
        softmax, sigmoid = (sums - 1).abs().amax() < 1e-3, largest.mean() > 0.5
        probabilities = (clean[few].amin() >= 0) & (largest.amax() <= 1) & (softmax | sigmoid)
        self.masks = [probabilities, changes]

    def _note_trouble(self, x: Tensor, y: Tensor, logits: Tensor) -> None:
        out_of_range = ((y < 0) | (y >= self.classes)).any()
        not_finite = ~logits.isfinite().all()
        self.trouble[:3] |= torch.stack(
            [outside(x, *self.threat.ends(x)), out_of_range, not_finite]
        )

    def _raise_trouble(self) -> None:
        """Raise the errors recorded so far; synchronises with the device."""
        outside, out_of_range, not_finite, no_attack = self.trouble.tolist()
        if outside:
            raise UserError(inputs.box_sentence(self.threat))
        if out_of_range:
            raise UserError(
                f"Labels are out of range: the model has {self.classes} classes, so labels run "
                f"from 0 to {self.classes - 1}."
            )
        if not_finite:
            raise NotFiniteError(
                "The model's outputs are not finite, so its accuracy means nothing; evaluate an "
                "earlier checkpoint, or evaluate without amp."
            )
        if no_attack:
            raise NotFiniteError(NO_ATTACK)

    def commit(self) -> None:
        """Save the counts after a complete batch; an interrupted batch does not change them."""
        self._committed = self.images, self.counts.clone()

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
