"""Layers that keep the initial learning rate while the schedule lowers that of the others
(RAT-LR)."""

from __future__ import annotations

from dataclasses import field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastadv.algorithms.contract import Layers
from fastadv.algorithms.layers.selected import Selected
from fastadv.declared import NonNegative, option
from fastadv.errors import UserError


class FixedRate(Selected):
    """AT-fix-lr-[k]: the groups k always learn at ``fixed_lr`` (RAT, Sec. 3.2, Fig. 3a).

    ``fixed_lr=None`` is the initial rate of the optimizer. With ``rate_form="group"`` the chosen
    layers are a separate optimizer group, as in the authors' training: the step restores the rate
    of that group before every update, whatever a scheduler set. ``rate_form="gradient"`` is the
    paper's Alg. 1 and Eq. 4: the chosen gradients are multiplied by eta = fixed_lr / (the present
    rate), which is 1, 10, 100 in a piecewise schedule. The two differ: eta does not scale weight
    decay, and it scales the input of the momentum buffer instead of its output.
    """

    called: ClassVar[str] = "fixed-lr"
    mark: ClassVar[str] = "fixed_rate"

    fixed_lr: NonNegative | None = option(
        None, "learning rate of the chosen layers; none: the initial one"
    )
    rate_form: Literal["group", "gradient"] = option(
        "group", "hold the rate by an optimizer group or by scaling the gradients"
    )

    rates: list[float] = field(init=False, repr=False, default_factory=list)
    members: list[frozenset[str]] = field(init=False, repr=False, default_factory=list)

    def group_settings(self, lr: float) -> dict[str, Any]:
        rate = lr if self.fixed_lr is None else self.fixed_lr
        return {"lr": rate, self.mark: rate}

    def optimizer_groups(self, model: nn.Module, lr: float) -> list[dict[str, Any]]:
        if self.rate_form == "group":
            return super().optimizer_groups(model, lr)
        return Layers.optimizer_groups(self, model, lr)

    def bind(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self.rate_form == "group":
            super().bind(model, optimizer)
            return
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            raise UserError(
                "rate_form='gradient' multiplies gradients, and Adam's steps do not follow their "
                "size; pass rate_form='group', or train with SGD."
            )
        self.chosen = self.select(model)
        groups = optimizer.param_groups
        unmarked = all(group.get(self.mark) is None for group in groups)
        self.require(unmarked and len(groups) >= len(self.rates))
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.members = [
            frozenset(names[id(p)] for p in group["params"] if id(p) in names) & self.chosen
            for group in groups
        ]
        # A scheduler built before the step may have changed lr; it stores the initial one in
        # initial_lr. Known groups keep their rate: new ones come from add_param_group, at the end.
        self.rates += [
            float(group.get("initial_lr", group["lr"])) if self.fixed_lr is None else self.fixed_lr
            for group in groups[len(self.rates) :]
        ]

    def before_update(
        self, optimizer: torch.optim.Optimizer, names: list[str], gradients: list[Tensor | None]
    ) -> None:
        """See ``SetsRates``."""
        if self.rate_form == "group":
            for group in optimizer.param_groups:
                if group.get(self.mark) is not None:
                    _set_rate(group, group[self.mark])
            return
        for group, rate, members in zip(
            optimizer.param_groups, self.rates, self.members, strict=True
        ):
            eta = _ratio(rate, group["lr"])
            for place, (name, gradient) in enumerate(zip(names, gradients, strict=True)):
                if gradient is not None and name in members:
                    gradients[place] = gradient * eta


class RatLR(FixedRate):
    """RAT-LR: the groups 3 and 4 keep the initial rate (RAT, Alg. 1)."""

    called: ClassVar[str] = "rat-lr"

    layer_groups: tuple[str, ...] | None = option(
        ("3", "4"), "layer groups that keep their learning rate, such as 3,4, or modules: layer4,fc"
    )


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _ratio(rate: float, now: float | Tensor) -> float | Tensor:
    """rate / now; 0 if the present rate ``now`` is 0, since nothing moves then."""
    if isinstance(now, Tensor):
        return torch.where(now > 0, rate / now, 0.0)
    return rate / now if now > 0 else 0.0
