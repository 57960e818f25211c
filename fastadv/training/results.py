"""The results of the passes of one update, before the optimizer steps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastadv.algorithms.contract import Adversarial, Batch, Outputs
from fastadv.engine.model.buffers import Snapshot
from fastadv.engine.optimizer.faults import Fault


class Gradients(NamedTuple):
    """Gradients of the outer loss times the loss scale; None if the loss does not depend on the
    tensor.

    ``weights``: those of the parameters that learn, in their order. ``leaves``: those of the
    adversary's tensors (learned step sizes). ``x_adv`` (B,C,H,W): None unless a part asks for it.
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
    accuracy: Tensor
    gradients: Gradients
    faults_found: dict[Fault, Tensor]
    buffers: Snapshot
    statistics: list[Tensor]
