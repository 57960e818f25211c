"""AWP: the weights move along the loss gradient before the outer step (Wu et al., 2020)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import (
    TRAINING,
    Capabilities,
    Losses,
    Pass,
    Setup,
    WeightGradient,
    WeightPerturbation,
)
from fastadv.declared import CountOrZero, NonNegative, option
from fastadv.errors import UserError
from fastadv.models.stages import stage_parameters


class AWP(WeightPerturbation):
    """v = gamma * |w|/|g| * g per tensor, the outer step taken at w + v, then v is subtracted.

    The tensors with "weight" in their name and more than one dimension are perturbed: convolutions
    and the classifier (csdongxian/AWP). Weight decay acts on w + v, as there.
    ``norm_scope="global"`` takes one ratio over all tensors together. In the first
    ``warmup_epochs`` epochs nothing is perturbed.

    ``groups`` ("3,4", or modules by name: "layer4,fc") perturbs only those layer groups (RAT-WP,
    AT-AWP-[k]: RAT, Eq. 6), along their part of the gradient of the whole network; ``split`` says
    how the network is cut into layer groups (``fastadv.models.stages``). ``loss_range`` (p,q) takes
    the direction from the samples whose adversarial cross entropy is in [p, q] (RWP, Fig. 1c); the
    outer step is on all samples.
    """

    suspects: ClassVar[tuple[str, ...]] = ("gamma",)

    gamma: NonNegative = option(
        0.01, "radius of the weight perturbation, relative to each tensor's norm"
    )
    norm_scope: Literal["tensor", "global"] = option(
        "tensor", "relate the radius to the norm of each tensor or of all together"
    )
    warmup_epochs: CountOrZero = option(0, "epochs before the weights are perturbed")
    groups: tuple[str, ...] | None = option(
        None, "layer groups whose weights are perturbed, such as 3,4, or modules: layer4; none: all"
    )
    split: Literal["stages", "quarters"] = option(
        "stages", "how the network is cut into layer groups"
    )
    loss_range: tuple[NonNegative, NonNegative] | None = option(
        None, "perturb along samples whose loss lies between these two; none: along all"
    )

    chosen: frozenset[str] | None = field(init=False, repr=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_range is not None and self.loss_range[0] > self.loss_range[1]:
            raise UserError(f"loss_range must rise, such as 0,1.5, not {self.loss_range}.")

    def follows_epochs(self) -> bool:
        return self.warmup_epochs > 0

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        model = setup.net.model
        if self.groups is not None:
            self.chosen = frozenset(stage_parameters(model, self.groups, self.split))
        named = dict(model.named_parameters())
        if not self.select(list(named), list(named.values())):
            where = "" if self.groups is None else f" in groups {','.join(self.groups)}"
            raise UserError(
                f"There is no weight matrix or kernel{where} of {type(model).__name__} to perturb."
            )

    def follow_model(self) -> None:
        self.prepare(self.setup)

    def select(self, names: Sequence[str], tensors: Sequence[Tensor]) -> list[int]:
        return [
            position
            for position, (name, tensor) in enumerate(zip(names, tensors, strict=True))
            if "weight" in name and tensor.ndim > 1 and self._may_move(name)
        ]

    @property
    def rounds(self) -> int:
        """The most gradients of the weights that one perturbation takes."""
        return 1

    def _may_move(self, name: str) -> bool:
        return self.chosen is None or name in self.chosen

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        # An upper bound: the backward pass for a perturbation of the last layers does not reach the
        # first ones, and RWP can stop early.
        each = 2 if method.objective_reads_center else 1
        return Counter({Pass(TRAINING, "train"): self.rounds * each})

    def schedule(self, update: int, epoch: float) -> None:
        self.active = epoch >= self.warmup_epochs

    def reduce(self, losses: Losses) -> tuple[Tensor, Tensor]:
        taken = self._in_range(losses)
        return (taken * losses.total).mean(), taken.sum()

    def _in_range(self, losses: Losses) -> Tensor:
        """1 for each sample (B,) that the direction is taken from, 0 for the others."""
        if self.loss_range is None:
            return torch.ones_like(losses.total)
        low, high = self.loss_range
        taken = (losses.adversarial >= low) & (losses.adversarial <= high)
        return taken.to(losses.total.dtype)

    @torch.no_grad()
    def perturb(self, weights: list[Tensor], gradient: WeightGradient) -> None:
        self.remember(weights)
        self.moved_by, _ = gradient()
        kernels.perturb_weights(weights, self.moved_by, self.gamma, self.norm_scope)
