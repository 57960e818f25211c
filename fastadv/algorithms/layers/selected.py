"""What every grouping of layers needs: the chosen parameters, and an optimizer with groups for
them."""

from collections.abc import Iterable
from dataclasses import field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fastadv.algorithms.contract import Layers
from fastadv.declared import option
from fastadv.errors import UserError
from fastadv.models.stages import stage_parameters
from fastadv.models.wrapped import inner_module


class Selected(Layers):
    """Treats the layers of ``layer_groups`` apart from the others: residual stages ("3,4"), "rest",
    or modules by name ("layer4,fc"; ``fastadv.models.stages.stage_parameters``).

    ``split`` says how the network is cut into layer groups (``fastadv.models.stages``). A selection
    without a parameter is an error. ``called`` is the name of the part, for errors; ``mark`` is the
    key that the optimizer group of the chosen layers carries.
    """

    called: ClassVar[str]
    mark: ClassVar[str]

    layer_groups: tuple[str, ...] | None = option(
        None, "layer groups that are treated apart, such as 3,4, or modules: layer4,fc"
    )
    split: Literal["stages", "quarters"] = option(
        "stages", "how the network is cut into layer groups"
    )

    chosen: frozenset[str] = field(init=False, repr=False, default=frozenset())

    def group_settings(self, lr: float) -> dict[str, Any]:
        """The entries of the chosen layers' optimizer group beside its parameters; ``lr`` is the
        initial learning rate."""
        raise NotImplementedError

    def select(self, model: nn.Module) -> frozenset[str]:
        """The names of the chosen parameters, as in the module inside ``torch.compile`` and DDP."""
        if not self.layer_groups:
            raise UserError(
                f"layers={self.called!r} acts on chosen layer groups: pass layer_groups=, for "
                'example "3,4".'
            )
        return frozenset(stage_parameters(model, self.layer_groups, self.split))

    def optimizer_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        chosen = self.select(model)
        named = dict(inner_module(model).named_parameters())
        others = [parameter for name, parameter in named.items() if name not in chosen]
        apart = [parameter for name, parameter in named.items() if name in chosen]
        groups: list[dict[str, Any]] = [{"params": others, "lr": lr}] if others else []
        return [*groups, {"params": apart} | self.group_settings(lr)]

    def bind(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.chosen = self.select(model)
        named = dict(inner_module(model).named_parameters())
        marked = [group for group in optimizer.param_groups if group.get(self.mark) is not None]
        self.require(_same((named[name] for name in self.chosen), marked))

    def require(self, right: bool) -> None:
        """Raise ``UserError``, which says how to build the optimizer, unless ``right``."""
        if not right:
            groups = ",".join(self.layer_groups or ())
            raise UserError(
                f"layers={self.called!r} needs an optimizer built from fastadv.param_groups(model, "
                f"layers={self.called!r}, lr=..., groups={groups!r}); this one's groups differ."
            )


def _same(parameters: Iterable[nn.Parameter], groups: list[dict[str, Any]]) -> bool:
    wanted = sorted(id(parameter) for parameter in parameters)
    return wanted == sorted(id(parameter) for group in groups for parameter in group["params"])
