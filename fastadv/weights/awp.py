"""AWP: weights move along the loss gradient before the outer step (Wu et al., 2020)."""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.contract import Losses, WeightGradient, WeightPerturbation


@dataclass(eq=False)
class AWP(WeightPerturbation):
    """v = gamma * |w|/|g| * g per tensor, the outer step taken at w + v, then v is taken back.

    Perturbed are the tensors named "weight" with more than one dimension: convolutions and the
    classifier (csdongxian/AWP). Weight decay acts on w + v, as there. ``norm_scope="global"``
    takes one ratio over all tensors together. The first ``warmup_epochs`` perturb nothing.
    """

    gamma: float = 0.01
    norm_scope: Literal["tensor", "global"] = "tensor"
    warmup_epochs: int = 0

    originals: list[Tensor] = field(init=False, repr=False, default_factory=list)
    moved_by: list[Tensor] = field(init=False, repr=False, default_factory=list)

    def select(self, names: list[str], tensors: list[Tensor]) -> list[int]:
        return [
            position
            for position, (name, tensor) in enumerate(zip(names, tensors, strict=True))
            if "weight" in name and tensor.ndim > 1
        ]

    def schedule(self, update: int, epoch: float) -> None:
        self.active = epoch >= self.warmup_epochs

    def reduce(self, losses: Losses) -> tuple[Tensor, Tensor]:
        count = torch.full((), losses.total.numel(), device=losses.total.device)
        return losses.total.mean(), count

    @torch.no_grad()
    def perturb(self, weights: list[Tensor], gradient: WeightGradient) -> None:
        self._remember(weights)
        self.moved_by, _ = gradient()
        kernels.perturb_weights(weights, self.moved_by, self.gamma, self.norm_scope)

    def _remember(self, weights: list[Tensor]) -> None:
        if not self.originals:
            self.originals = [torch.empty_like(weight) for weight in weights]
        torch._foreach_copy_(self.originals, weights)

    @torch.no_grad()
    def restore(self, weights: list[Tensor]) -> None:
        kernels.restore_weights(weights, self.originals, self.moved_by)
