"""Layers that never learn (RAT, AT-fix-param-[k])."""

from typing import Any, ClassVar

import torch
from torch import nn

from fastadv.algorithms.layers.selected import Selected
from fastadv.errors import UserError


class Frozen(Selected):
    """AT-fix-param-[k]: the groups k stay at their initial weights (RAT, Fig. 2).

    Their convolutions and BatchNorm's affine parameters get no gradient, no momentum and no weight
    decay; BatchNorm's running statistics are still updated. The stem, the final BatchNorm and the
    classifier ("rest") learn unless they are chosen.
    """

    called: ClassVar[str] = "frozen"
    mark: ClassVar[str] = "frozen"

    def group_settings(self, lr: float) -> dict[str, Any]:
        return {"lr": 0.0, "weight_decay": 0.0, self.mark: True}

    def bind(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().bind(model, optimizer)
        if len(self.chosen) == len(list(model.parameters())):
            raise UserError("layers='frozen' leaves nothing to train; choose fewer layer_groups.")

    def learns(self, name: str) -> bool:
        """See ``Freezes``."""
        return name not in self.chosen
