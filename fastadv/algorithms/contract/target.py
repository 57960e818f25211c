"""The target: the label that is fitted."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.tensors import Batch, Context


class Target(Part):
    """The label that is fitted, and the loss that compares logits with it.

    ``labels`` says which labels ``y`` the target takes: "classes" are (B,) int64, or soft labels
    (B,classes) that sum to 1; "any" are any tensor (B,...), with logits (B,...) of any shape.
    """

    labels: ClassVar[str] = "classes"

    def prepare_batch(self, batch: Batch, context: Context) -> Context:
        """``context`` with the targets of this batch; called before the attack."""
        return context

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The loss (B,) of ``logits`` against the target, of the shapes that ``labels`` says. The
        objective calls it, once for each logits that it fits."""
        raise NotImplementedError


Fit = Callable[[Tensor, Tensor, Context], Tensor]
