"""The weights part: it perturbs the weights before the outer pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field
from typing import NamedTuple, final

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract.part import Part


class Losses(NamedTuple):
    """Per-sample losses (B,) at the present weights: ``total`` is the whole objective,
    ``adversarial`` the cross entropy at x', or the user's own criterion. ``plain`` is True if the
    two are the same: the cross entropy of ``logits`` (B,classes) with ``y`` (B,) int64."""

    total: Tensor
    adversarial: Tensor
    logits: Tensor
    y: Tensor
    plain: bool


WeightGradient = Callable[[], tuple[list[Tensor], Tensor]]


class WeightPerturbation(Part):
    """Perturbs the weights for the outer pass, so that its loss rises: after the attack, in epochs
    in which it is ``active``. The step subtracts ``moved_by`` after the optimizer's step.
    """

    originals: list[Tensor] = field(init=False, repr=False, default_factory=list)
    moved_by: list[Tensor] = field(init=False, repr=False, default_factory=list)

    def refuses_accumulation(self) -> str | None:
        return "it perturbs the weights along the gradient of all images, before their outer pass"

    def select(self, names: Sequence[str], tensors: Sequence[Tensor]) -> list[int]:
        """The positions in ``tensors`` of the parameters that are perturbed, by default those with
        more than one dimension. ``names`` and ``tensors`` are in the same order."""
        return [place for place, tensor in enumerate(tensors) if tensor.ndim > 1]

    def reduce(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """The scalar whose gradient is the direction of the perturbation, and the number of samples
        in it (0-dim)."""
        raise NotImplementedError

    def perturb(self, weights: list[Tensor], gradient: WeightGradient) -> None:
        """Perturb ``weights`` in place, after ``remember``, and leave the perturbation in
        ``moved_by``. ``gradient()`` computes the gradients of ``reduce`` at the present weights,
        one per tensor of ``weights``, and the number of samples in it."""
        raise NotImplementedError

    @final
    def remember(self, weights: list[Tensor]) -> None:
        """Copy ``weights``, for ``restore``."""
        if [old.shape for old in self.originals] != [weight.shape for weight in weights]:
            self.originals = [torch.empty_like(weight) for weight in weights]
        torch._foreach_copy_(self.originals, weights)

    @final
    @torch.no_grad()
    def restore(self, weights: list[Tensor]) -> None:
        """Subtract the perturbation from ``weights``, in place; the optimizer's step stays."""
        kernels.restore_weights(weights, self.originals, self.moved_by)
