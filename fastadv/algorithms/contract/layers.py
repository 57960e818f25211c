"""The layers part: which layers learn, and at which learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastadv.algorithms.contract.part import Part


class Layers(Part):
    """Which layers learn, and at which learning rate."""

    def optimizer_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """The parameter groups of the optimizer, which hold every parameter of ``model`` exactly
        once. ``lr`` is the learning rate of a layer that is not treated apart."""
        return [{"params": list(model.parameters()), "lr": lr}]

    def bind(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take over the model and its optimizer, when the step is built and again after a change of
        either. Raises ``UserError`` if the groups of ``optimizer`` are not those of
        ``optimizer_groups``."""
