"""The attack's loss: what the adversary maximises."""

from __future__ import annotations

from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.returned import per_image
from fastadv.algorithms.contract.target import Fit
from fastadv.algorithms.contract.tensors import Context


class AttackLoss(Part):
    """What the adversary maximises at ``logits`` (B,classes) of the attacked images.

    A part implements ``per_sample``, ``mean`` or both: ``mean`` may add terms of the whole batch.
    ``y`` are the labels, in a targeted attack the wanted ones, whose loss the attack lowers.
    ``fit`` is the target's ``fit``, which a loss on the label may use. The step adds the target's
    penalty and the loss scale (``Setup.attack_loss``).
    """

    def per_sample(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        """The loss of each sample (B,); restarts compare it."""
        raise NotImplementedError

    def mean(self, logits: Tensor, y: Tensor, context: Context, fit: Fit) -> Tensor:
        """The loss of the batch (0-dim), whose gradient the attack follows."""
        losses = self.per_sample(logits, y, context, fit)
        return per_image(losses, len(logits), self, "per_sample").mean()
