"""The target: which label is fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.tensors import Batch, Intermediates, Outputs


@dataclass(eq=False)
class Target(Part):
    """Which label is fitted."""

    def is_plain(self) -> bool:
        """Whether it is exactly the cross entropy with the given label."""
        return False

    def prepare_batch(self, batch: Batch, intermediates: Intermediates) -> Intermediates:
        """``intermediates`` and what the attack and the outer pass fit; before the attack."""
        return intermediates

    def teach(self, x_adv: Tensor) -> Tensor:
        """Teachers' logits (teachers,B,classes) on ``x_adv``: the need ``teacher_logits``."""
        raise NotImplementedError

    def attack_term(self, logits: Tensor, intermediates: Intermediates) -> Tensor | None:
        """A per-sample term (B,) of the attack's objective."""
        return None

    def fit(self, logits: Tensor, y: Tensor, intermediates: Intermediates) -> Tensor:
        """Per-sample loss (B,) of ``logits`` against the target."""
        raise NotImplementedError

    def penalty(
        self, fitted: Tensor, adversarial: Tensor, intermediates: Intermediates
    ) -> Tensor | None:
        """A per-sample term (B,) of the outer loss; ``fitted``: the logits the objective fits."""
        return None

    def after(self, batch: Batch, outputs: Outputs, ok: Tensor) -> None:
        """Update the state, only where ``ok``."""


Fit = Callable[[Tensor, Tensor, Intermediates], Tensor]
