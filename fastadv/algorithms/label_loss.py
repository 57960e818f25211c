"""The loss of the label: what a part differentiates that compares gradients of the loss."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import Context, Target
from fastadv.algorithms.contract.returned import fitted


class LabelLoss:
    """The ``label_loss`` of ``Setup``: the cross entropy with y, whatever label ``target`` fits;
    the loss of a ``target`` that takes any labels."""

    def __init__(self, target: Target) -> None:
        self.target = target

    def __call__(
        self,
        logits: Tensor,
        y: Tensor,
        context: Context,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """The loss of ``logits`` (B,...) and the labels ``y``, 0-dim; (B,) for "none"."""
        if self.target.labels == "classes":
            return functional.cross_entropy(logits, y, reduction=reduction)
        losses = fitted(self.target, logits, y, context)
        if reduction == "none":
            return losses
        return losses.mean() if reduction == "mean" else losses.sum()
