"""What the passes of one update compute, before the optimizer steps."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastadv.algorithms.contract import Adversarial, Batch, Outputs
from fastadv.engine.model.buffers import Snapshot
from fastadv.engine.optimizer.faults import Fault


class Gradients(NamedTuple):
    """Gradients of the outer loss times the loss scale; None where the loss does not depend on it.

    ``weights``: of the parameters that learn, in their order; ``leaves``: of the adversary's
    tensors (learned step sizes); ``x_adv`` (B,C,H,W) where the adversary asks for it.
    """

    weights: list[Tensor | None]
    leaves: list[Tensor | None]
    x_adv: Tensor | None


class OuterPass(NamedTuple):
    """The outer loss (0-dim), its gradients, and the logits (B,classes) at x_adv and, where a part
    needs them, at x; all detached."""

    loss: Tensor
    gradients: Gradients
    adversarial: Tensor
    natural: Tensor | None


class PassResults(NamedTuple):
    """What ``Update.compute_gradients`` hands to ``apply_gradients`` and ``finish_update``.

    ``doubts`` are what must not be for the update to count, 0-dim bool. ``buffers`` are the
    model's before the update; ``statistics`` those of the passes, which several processes average.
    """

    batch: Batch
    attacked: Adversarial
    outputs: Outputs
    loss: Tensor
    accuracy: Tensor
    gradients: Gradients
    doubts: dict[Fault, Tensor]
    buffers: Snapshot
    statistics: list[Tensor]
