"""The layers part: which layers learn, and at which learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.algorithms.contract.part import Part


@dataclass(eq=False)
class Layers(Part):
    """Which layers learn, and at which learning rate."""

    def optimizer_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer, which hold every parameter of ``model`` exactly
        once. ``lr`` is the learning rate of a layer that is not treated apart."""
        return [{"params": list(model.parameters()), "lr": lr}]

    def bind(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take over the model and its optimizer. Raises ``UserError`` if the groups of
        ``optimizer`` are not those of ``optimizer_groups``."""

    def learns(self, name: str) -> bool:
        """True if the parameter called ``name`` gets a gradient."""
        return True

    def before_update(
        self, optimizer: torch.optim.Optimizer, names: list[str], gradients: list[Tensor | None]
    ) -> None:
        """Set learning rates, or replace entries of ``gradients``, before the optimizer step.
        ``names`` and ``gradients`` are in the same order; None is a parameter without gradient."""
