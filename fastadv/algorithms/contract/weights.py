"""The weights part: it perturbs the weights before the outer pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fastadv.algorithms.contract.part import Part


class Losses(NamedTuple):
    """Per-sample losses (B,) at the present weights: ``total`` is the whole objective,
    ``adversarial`` the cross entropy at x'. ``plain`` is True if the two are the same: the cross
    entropy of ``logits`` (B,classes) with ``y`` (B,) int64."""

    total: Tensor
    adversarial: Tensor
    logits: Tensor
    y: Tensor
    plain: bool


WeightGradient = Callable[[], tuple[list[Tensor], Tensor]]


@dataclass(eq=False)
class WeightPerturbation(Part):
    """Perturbs the weights for the outer pass, so that its loss rises."""

    def refuses_accumulation(self) -> str | None:
        return "it perturbs the weights along the gradient of all images, before their outer pass"

    def select(self, names: Sequence[str], tensors: Sequence[Tensor]) -> list[int]:
        """The positions in ``tensors`` of the parameters that are perturbed. ``names`` and
        ``tensors`` are in the same order."""
        raise NotImplementedError

    def reduce(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """The scalar whose gradient is the direction of the perturbation, and the number of samples
        in it (0-dim)."""
        raise NotImplementedError

    def perturb(self, weights: list[Tensor], gradient: WeightGradient) -> None:
        """Perturb ``weights`` in place. ``gradient()`` computes the gradients of ``reduce`` at the
        present weights, one per tensor of ``weights``, and the number of samples in it."""
        raise NotImplementedError

    def restore(self, weights: list[Tensor]) -> None:
        """Subtract the perturbation from ``weights``, in place; the optimizer's step stays."""
        raise NotImplementedError
