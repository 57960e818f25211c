"""The layers part: which layers learn, and at which rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.algorithms.contract.part import Part


@dataclass(eq=False)
class Layers(Part):
    """Which layers learn, and at which rate."""

    def optimizer_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: every parameter of ``model`` exactly once."""
        return [{"params": list(model.parameters()), "lr": lr}]

    def bind(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Learn the model; raise ``UserError`` unless ``optimizer`` has ``optimizer_groups``."""

    def learns(self, name: str) -> bool:
        """Whether the parameter called ``name`` gets a gradient."""
        return True

    def before_update(
        self, optimizer: torch.optim.Optimizer, names: list[str], gradients: list[Tensor | None]
    ) -> None:
        """Set rates, or scale gradients in place, just before the optimizer steps."""
