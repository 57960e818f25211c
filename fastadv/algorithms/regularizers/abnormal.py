"""AAER: the change of the prediction where an attack lowers the loss (Lin et al., NeurIPS 2023)."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from fastadv.algorithms.contract import (
    FORWARD,
    Adversarial,
    Batch,
    Capabilities,
    Outputs,
    Pass,
    Regularizer,
)
from fastadv.declared import NonNegative, option
from fastadv.errors import UserError


class Abnormal(Regularizer):
    """(n/B) (``fall_weight`` F + ``change_weight`` max(V - U, 0)).

    An example is abnormal if its loss (the cross entropy, or the user's own) at x' is below that at
    the start x0; there are n of B. F is the mean fall of the loss of the abnormal ones, V and U are
    the means of |f(x') - f(x0)|_2^2 over the abnormal and the other ones. The term is 0 if all or
    none are abnormal.

    Only V is differentiated, in f(x') alone. F, a penalty in the paper, is in the loss and has no
    gradient in the authors' code (tmllab/2023_NeurIPS_AAER, CIFAR10/AAER.py). V - U is at most
    ``change_limit``, above which it has no gradient (FastAT_Benchmark, fast_at/aaer.py); the
    authors have no limit.
    """

    fall_weight: NonNegative = option(2.5, "weight of the fall of the loss; it has no gradient")
    change_weight: NonNegative = option(1.5, "weight of the change of the logits")
    change_limit: NonNegative = option(100.0, "largest change that is penalised")

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        return Counter({Pass(FORWARD, "train"): 1})

    def refuses_accumulation(self) -> str:
        return "it counts the abnormal examples of a call"

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        if attacked.start is None:
            raise UserError(
                "abnormal compares the end of an attack with its start: take an adversary with "
                "gradient steps, such as 'fast'."
            )
        with self.net.bn_momenta.still(), torch.no_grad():
            before = self.net.logits(attacked.start)
        after = outputs.adversarial
        fall = self._losses(before, batch, outputs) - self._losses(after.detach(), batch, outputs)
        abnormal = fall > 0
        normal = ~abnormal
        change = (before - after).square().flatten(1).sum(1)
        away = _mean(change, abnormal) - _mean(change, normal).detach()
        away = away.clamp(0, self.change_limit)
        both = abnormal.any() & normal.any()
        term = self.fall_weight * _mean(fall, abnormal) + self.change_weight * away
        return torch.where(both, abnormal.to(term.dtype).mean() * term, 0.0)

    def _losses(self, logits: Tensor, batch: Batch, outputs: Outputs) -> Tensor:
        """(B,)"""
        return self.setup.label_loss(logits, batch.y, outputs.context, "none")


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean (0-dim) of ``values`` (B,) where ``chosen`` (B,) is true; 0 if it is nowhere."""
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)
