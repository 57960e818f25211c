"""The weights part: it moves the weights before the outer pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from fastadv.algorithms.contract.part import Part


class Losses(NamedTuple):
    """Per-sample losses (B,) at the weights of the moment: the whole objective, and plain
    adversarial cross entropy. ``plain`` says that the two are the same, the cross entropy of
    ``logits`` (B,classes) with ``y`` (B,)."""

    total: Tensor
    adversarial: Tensor
    logits: Tensor
    y: Tensor
    plain: bool


WeightGradient = Callable[[], tuple[list[Tensor], Tensor]]


@dataclass(eq=False)
class WeightPerturbation(Part):
    """Moves the weights to a worse place for the outer pass."""

    accumulates: ClassVar[bool] = False

    def select(self, names: Sequence[str], tensors: Sequence[Tensor]) -> list[int]:
        """Which parameters are perturbed: positions in ``tensors``."""
        raise NotImplementedError

    def reduce(self, losses: Losses) -> tuple[Tensor, Tensor]:
        """The scalar whose gradient is the direction, and the 0-dim count of samples in it."""
        raise NotImplementedError

    def perturb(self, weights: list[Tensor], gradient: WeightGradient) -> None:
        """Move ``weights`` in place. ``gradient()`` gives the gradients of ``reduce`` at the
        present weights, one a tensor of ``weights``, and its count."""
        raise NotImplementedError

    def restore(self, weights: list[Tensor]) -> None:
        """Take the perturbation back, keeping what the optimizer did."""
        raise NotImplementedError
