"""The target: the label that is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.tensors import Batch, Context, Outputs


@dataclass(eq=False)
class Target(Part):
    """The label that is fitted, and the loss that compares logits with it.

    ``labels`` says which labels ``y`` the target takes: "classes" are (B,) int64, or soft labels
    (B,classes) that sum to 1; "any" are any tensor (B,...), with logits (B,...) of any shape.
    """

    labels: ClassVar[str] = "classes"

    def is_plain(self) -> bool:
        """True if ``fit`` is exactly the cross entropy with the given label."""
        return False

    def prepare_batch(self, batch: Batch, context: Context) -> Context:
        """``context`` with the targets of this batch; called before the attack."""
        return context

    def teach(self, x_adv: Tensor) -> Tensor:
        """The teachers' logits (teachers,B,classes) on ``x_adv`` (B,C,H,W), for the need
        ``teacher_logits``."""
        raise NotImplementedError

    def attack_term(self, logits: Tensor, context: Context) -> Tensor | None:
        """A per-sample term (B,) that is added to the attack's objective, or None."""
        return None

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """The loss (B,) of ``logits`` against the target, of the shapes that ``labels`` says."""
        raise NotImplementedError

    def penalty(self, fitted: Tensor, adversarial: Tensor, context: Context) -> Tensor | None:
        """A per-sample term (B,) that is added to the outer loss, or None. ``fitted`` are the
        logits that the objective fits; both logits are (B,classes)."""
        return None

    def after(self, batch: Batch, outputs: Outputs, ok: Tensor) -> None:
        """Update the state after the outer pass, only where ``ok`` (0-dim bool)."""


Fit = Callable[[Tensor, Tensor, Context], Tensor]
