"""RWP: weights are perturbed only by samples whose loss is small (RWP paper, Eq. 9 and Alg. 1)."""

from typing import Literal

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.algorithms.contract import Losses, WeightGradient
from fastadv.algorithms.weights.awp import AWP
from fastadv.declared import NonNegative, Passes, option


class RWP(AWP):
    """Up to ``weight_steps`` steps of v, each along the gradient of the samples with l <= c_min.

    At step k the loss is (1/B) sum of m_i l_i at w + v, m_i = 1[l_i <= c_min]. The gradients are
    summed, and the sum is rescaled to gamma |w| for use (released code).
    ``accumulate="renormalise"`` rescales v in place before the next gradient is added (Alg. 1).
    The ratio is global over all perturbed tensors; ``norm_scope="tensor"`` is AWP's. A step without
    a sample at or below ``c_min`` changes nothing, and so do all steps after it.

    ``rwp_loss="adversarial"`` compares c_min with the adversarial cross entropy instead of the
    whole objective (the two differ for TRADES, for which no published code runs).
    """

    norm_scope: Literal["tensor", "global"] = option(
        "global", "relate the radius to the norm of each tensor or of all together"
    )
    c_min: NonNegative = option(1.7, "perturb along samples whose loss is at most this")
    weight_steps: Passes = option(10, "most steps of the weight perturbation")
    accumulate: Literal["sum", "renormalise"] = option(
        "sum", "sum the gradients and rescale for use, or rescale in place after each step"
    )
    rwp_loss: Literal["total", "adversarial"] = option(
        "total", "loss that is compared with c_min: the whole objective or the adversarial one"
    )

    @property
    def rounds(self) -> int:
        return self.weight_steps

    def reduce(self, losses: Losses) -> tuple[Tensor, Tensor]:
        if losses.plain and self.loss_range is None:
            return kernels.masked_ce(losses.logits, losses.y, self.c_min)
        compared = losses.total if self.rwp_loss == "total" else losses.adversarial
        easy = (compared <= self.c_min).to(losses.total.dtype) * self._in_range(losses)
        return (easy * losses.total).mean(), easy.sum()

    @torch.no_grad()
    def perturb(self, weights: list[Tensor], gradient: WeightGradient) -> None:
        self.remember(weights)
        empty = [torch.empty_like(weight) for weight in (*weights, *weights)]
        torch._foreach_zero_(empty)
        total, self.moved_by = empty[: len(weights)], empty[len(weights) :]
        for _ in range(self.weight_steps):
            found, count = gradient()
            if self.net.syncs_are_free and not count:
                break
            if self.accumulate == "sum":
                torch._foreach_add_(total, found)
                torch._foreach_copy_(self.moved_by, total)
            else:
                torch._foreach_add_(self.moved_by, found)
            torch._foreach_copy_(weights, self.originals)
            kernels.perturb_weights(weights, self.moved_by, self.gamma, self.norm_scope)
