"""NuAT's nuclear norm, which a regularizer and an attack's loss share with its weight
(Sriramanan et al., 2021)."""

from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.contract import Weighted
from fastadv.declared import NonNegative, ShareAboveZero, option


def nuclear(change: Tensor) -> Tensor:
    """The sum of the singular values of ``change`` (B,classes), divided by B (0-dim); NaN, and no
    error of the decomposition, for values that are not finite."""
    finite = change.isfinite()
    told = torch.where(finite.all(), 0.0, torch.nan).to(change.dtype)
    return torch.linalg.svdvals(torch.where(finite, change, 0.0)).sum() / len(change) + told


class RisingWeight(Weighted):
    """A weight that rises by equal amounts after each epoch, from 0 to ``reg_weight`` at
    ``ramp_end`` of the run.

    9/10 is the published code's, where the last 10 epochs of any run keep the weight; the paper's
    runs have 100. The norm is divided by the size of the batch, also of a shorter last one, which
    the published code divides by the size of the others.
    """

    suspects: ClassVar[tuple[str, ...]] = ("reg_weight",)

    reg_weight: NonNegative = option(4.5, "weight of the nuclear norm at the end of its rise")
    reg_ramp: bool = option(True, "let the weight of the nuclear norm rise over the run")
    ramp_end: ShareAboveZero = option(
        0.9, "share of the run after which the weight of the nuclear norm has risen"
    )

    def refuses_accumulation(self) -> str:
        return "the nuclear norm is that of all images of a call together"

    def ramp(self, epoch: int, epochs: float) -> float:
        return min(epoch / (self.ramp_end * epochs), 1.0)
