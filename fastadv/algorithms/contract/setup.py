"""The run as every part sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from fastadv.algorithms.contract.capabilities import Capabilities
from fastadv.algorithms.contract.tensors import Batch, Context
from fastadv.engine.model.network import Network
from fastadv.threat import Threat


class AttackedLoss(Protocol):
    """What the adversary maximises at ``logits`` (B,classes) for the labels ``y``: the attack's
    loss plus the target's penalty."""

    def __call__(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The loss of the batch, times the loss scale (0-dim)."""

    def per_sample(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The loss of each sample (B,), without the loss scale."""


class PreparesBatch(Protocol):
    """What the target makes of a batch before its attack (``Target.prepare_batch``)."""

    def __call__(self, batch: Batch, context: Context) -> Context: ...


class LossOfLabel(Protocol):
    """The cross entropy with the label; the target's own loss if it takes any labels."""

    def __call__(
        self,
        logits: Tensor,
        y: Tensor,
        context: Context,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """The loss at ``logits`` (B,classes): of the batch (0-dim), or of each sample (B,)."""


class Begins(Protocol):
    """The start of an attack (``Start.point``)."""

    def point(self, batch: Batch, restart: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class Setup:
    """The run, given to every part in ``prepare``. If the caller sets another threat, or the model
    gets another number of classes, ``part.setup`` is replaced, without another ``prepare``.

    ``net`` makes the forward passes (``net.logits``), on ``device``. ``threat`` is that of the run;
    the images of one batch may have another (``Batch.threat``). ``dtype`` is that of the
    images, ``image_shape`` is (C,H,W), ``batch_size`` the size of the first batch. ``num_samples``
    is the size of the training set, ``num_classes`` the number of logits. ``total_steps`` and
    ``steps_per_epoch`` count updates. What the caller did not give is None. ``seed`` is that of the
    noise. ``method`` is what the parts offer each other.

    ``sound()`` (0-dim bool on the device) is true as long as no update was bad; code that changes
    state outside of an update masks the change with it. ``attack_loss(logits, y, context)`` is the
    scalar that the adversary maximises. ``label_loss(logits, y, context)`` is the loss of the
    label, for a part that differentiates it; ``fit(logits, y, context)`` that of the target, for
    each sample (B,). ``prepare_batch(batch, context)`` is the target's: an adversary that attacks
    images of its own calls it for their labels. ``start`` is the start part, None for the
    adversary's own start.
    """

    net: Network
    threat: Threat
    device: torch.device
    dtype: torch.dtype
    image_shape: tuple[int, int, int]
    batch_size: int
    num_samples: int | None
    num_classes: int
    total_steps: int | None
    steps_per_epoch: int | None
    seed: int
    method: Capabilities
    attack_loss: AttackedLoss
    label_loss: LossOfLabel
    fit: Callable[[Tensor, Tensor, Context], Tensor]
    prepare_batch: PreparesBatch
    start: Begins | None
    sound: Callable[[], Tensor]

    @property
    def total_epochs(self) -> float | None:
        """The length of the run in epochs, or None unless both lengths are known."""
        if self.total_steps is None or not self.steps_per_epoch:
            return None
        return self.total_steps / self.steps_per_epoch
