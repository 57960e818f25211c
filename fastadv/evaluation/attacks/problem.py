"""The input of an evaluation attack: a model, images with labels, and the allowed ball."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastadv.algorithms.user_loss import UserLoss
from fastadv.engine import noise
from fastadv.engine.gradient import input_gradient, leaf
from fastadv.engine.model.network import Network
from fastadv.errors import UserError
from fastadv.evaluation.attacks.watch import Watch
from fastadv.ranges import hard, require_logits, require_width
from fastadv.threat import Threat
from fastadv.threat import batch as threats

STREAM = noise.EVALUATION


@dataclass(frozen=True)
class Problem:
    """Images ``x`` (B,...) in pixels with labels ``y`` (B,), and the ``threat`` around them.

    In a targeted threat ``y`` are the classes to reach.

    ``index`` (B,) is each image's row in the noise stream, so that its random start does not depend
    on the batch. ``start`` is a given initial perturbation in pixels. ``natural`` holds the logits
    of ``x`` if the objective needs them. ``criterion`` is a loss of the user's that the attack
    maximises in place of the cross entropy, ``right`` what counts as right in place of the class,
    both functions of logits and ``y``. With ``any_labels`` logits and ``y`` are (B,...) of any
    shape; otherwise ``y`` are classes (B,) or soft labels (B,classes). ``largest_label`` is the
    largest of ``y`` if the labels have not yet been checked against the number of classes.
    ``watch`` receives every gradient, with the logits. ``between`` is called before each gradient,
    and may raise to end the attack.
    """

    net: Network
    threat: Threat
    x: Tensor
    y: Tensor
    index: Tensor
    seed: int = 0
    start: Tensor | None = None
    natural: Tensor | None = None
    largest_label: int = 0
    watch: Watch | None = None
    criterion: UserLoss | None = None
    right: UserLoss | None = None
    any_labels: bool = False
    between: Callable[[], None] = lambda: None

    def logits(self, x: Tensor) -> Tensor:
        """Logits (B,classes) of ``x``; raises ``UserError`` if they do not fit the labels."""
        logits = self.net.logits(x)
        if self.any_labels:
            return logits
        require_logits(logits)
        require_width(self.y, logits.shape[1])
        if self.largest_label >= logits.shape[1]:
            raise UserError(
                f"Label {self.largest_label} is out of range: the model has {logits.shape[1]} "
                f"classes, so labels run from 0 to {logits.shape[1] - 1}."
            )
        return logits

    def gradient(self, x_adv: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """The gradient (B,...) of each sample's own loss at ``x_adv``, and the logits there.

        The losses are summed, not averaged: a sample's gradient does not depend on the batch size.
        """
        self.between()
        x_adv = leaf(x_adv)
        logits = self.logits(x_adv)
        total = loss(logits, self).sum()
        scale = self.net.loss_scale(1)
        if scale != 1:
            total = total * scale
        gradient, logits = input_gradient(total, x_adv), logits.detach()
        if self.watch is not None:
            standing = None if self.is_right(logits) is None else self.resists(logits)
            self.watch.see(gradient, logits, standing)
        return gradient, logits

    def resists(self, logits: Tensor) -> Tensor:
        """(B,) bool: the attack has not succeeded yet. It has when the class is another than ``y``,
        a targeted attack when the class is ``y``. Where nothing says what is right, no attack
        succeeds before its end."""
        right = self.is_right(logits)
        if right is None:
            return torch.ones(len(logits), dtype=torch.bool, device=logits.device)
        return ~right if self.threat.targeted else right

    def is_right(self, logits: Tensor) -> Tensor | None:
        """(B,) bool: the class is that of ``y``, or what ``right`` says. None if ``y`` are no
        classes and there is no ``right``."""
        if self.right is not None:
            return self.right(logits, self.y)
        classes = self.y.dim() == 1 and self.y.dtype == torch.int64
        classes = classes and logits.dim() == 2 and logits.shape[1] > 1
        if self.any_labels and not classes:
            return None
        return logits.argmax(1) == hard(self.y)

    def random_start(self, draw: int, stream: int, *, clipped: bool = True) -> Tensor:
        """Random point number ``draw`` of the ball, the same for a sample in every batch, clipped
        to the range of images if ``clipped``."""
        threat = self.threat if clipped else self.threat.unboxed()
        return threat.start(self.x, self.index, self.seed, draw, stream)

    def with_natural_logits(self) -> Problem:
        """The same problem, with the logits of the clean images."""
        with torch.no_grad():
            return replace(self, natural=self.logits(self.x))

    def subset(self, rows: Tensor) -> Problem:
        """The problem of some of the samples."""
        return replace(
            self,
            threat=threats.of_rows(self.threat, rows),
            x=self.x[rows],
            y=self.y[rows],
            index=self.index[rows],
            start=None if self.start is None else self.start[rows],
            natural=None if self.natural is None else self.natural[rows],
        )


Loss = Callable[[Tensor, Problem], Tensor]
"""Per-sample loss (B,) of logits (B,classes), which an attack maximises."""
