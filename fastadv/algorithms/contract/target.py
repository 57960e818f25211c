"""The target: which label is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.tensors import Batch, Context, Outputs


@dataclass(eq=False)
class Target(Part):
    """Which label is fitted."""

    def is_plain(self) -> bool:
        """Whether it is exactly the cross entropy with the given label."""
        return False

    def prepare_batch(self, batch: Batch, context: Context) -> Context:
        """``context`` with this batch's targets; called before the attack."""
        return context

    def teach(self, x_adv: Tensor) -> Tensor:
        """Teachers' logits (teachers,B,classes) on ``x_adv``: the need ``teacher_logits``."""
        raise NotImplementedError

    def attack_term(self, logits: Tensor, context: Context) -> Tensor | None:
        """A per-sample term (B,) of the attack's objective."""
        return None

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        """Per-sample loss (B,) of ``logits`` against the target."""
        raise NotImplementedError

    def penalty(self, fitted: Tensor, adversarial: Tensor, context: Context) -> Tensor | None:
        """A per-sample term (B,) of the outer loss; ``fitted``: the logits the objective fits."""
        return None

    def after(self, batch: Batch, outputs: Outputs, ok: Tensor) -> None:
        """Update the state, only where ``ok``."""


Fit = Callable[[Tensor, Tensor, Context], Tensor]
