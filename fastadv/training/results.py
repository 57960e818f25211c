"""The results of the passes of one update, before the optimizer steps."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastadv import ranges
from fastadv.algorithms.contract import Adversarial, Batch, Outputs
from fastadv.engine.model.buffers import Snapshot
from fastadv.engine.optimizer.faults import Fault


def share_right(logits: Tensor, y: Tensor, labels: str) -> Tensor | None:
    """The share (0-dim float32) of samples of which the largest of the ``logits`` (B,classes) is
    that of the class ``y`` (B,) int64, or of the largest entry of a soft label (B,classes).

    None if ``y`` are no classes: with ``labels`` "any" (``Target.labels``) unless they are (B,)
    int64 and there are several logits.
    """
    classes = y.ndim == 1 and y.dtype == torch.int64 and logits.ndim == 2 and logits.shape[1] > 1
    if labels == "any" and not classes:
        return None
    return (logits.argmax(1) == ranges.hard(y)).float().mean()


class Gradients(NamedTuple):
    """Gradients of the outer loss times the loss scale; None if the loss does not depend on the
    tensor.

    ``weights``: those of the parameters that learn, in their order. ``leaves``: those of the
    adversary's tensors (learned step sizes). ``x_adv`` (B,C,H,W): that of x_adv, or of the attack's
    start; None unless a part asks for it.
    """

    weights: list[Tensor | None]
    leaves: list[Tensor | None]
    x_adv: Tensor | None


class OuterPass(NamedTuple):
    """The outer loss (0-dim), its gradients, and the logits (B,classes): ``adversarial`` at x_adv,
    ``natural`` at the ball's centre, None unless a part needs them. ``term`` (0-dim) is that of the
    regularizer, None without one. All are detached."""

    loss: Tensor
    gradients: Gradients
    adversarial: Tensor
    natural: Tensor | None
    term: Tensor | None


class PassResults(NamedTuple):
    """The result of ``Update.compute_gradients``, for ``apply_gradients`` and ``finish_update``.

    ``loss`` and ``accuracy`` are 0-dim, as is ``term``, the regularizer's, None without one.
    ``accuracy`` is None if the labels are no classes, and ``clean_accuracy``, that of x, also if
    the outer pass does not forward x.
    ``faults_found`` is fault -> 0-dim bool; the update counts only if all are false. ``buffers``
    are the values of the model's buffers before the update.
    ``statistics`` are the model's floating-point buffers if several processes train, which average
    them, otherwise empty.
    """

    batch: Batch
    attacked: Adversarial
    outputs: Outputs
    loss: Tensor
    term: Tensor | None
    accuracy: Tensor | None
    clean_accuracy: Tensor | None
    gradients: Gradients
    faults_found: dict[Fault, Tensor]
    buffers: Snapshot
    statistics: list[Tensor]
