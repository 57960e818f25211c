"""SSAT: the shortest part of an FGSM step that is misclassified (Kim et al., AAAI 2021)."""

from collections import Counter
from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.adversaries.fast import Fast
from fastadv.algorithms.contract import (
    FORWARD,
    Adversarial,
    Batch,
    Capabilities,
    Context,
    Pass,
)
from fastadv.declared import Passes, option


class SSAT(Fast):
    """x' = x + (k/c) d for the smallest k in 0 ... c with x + (k/c) d misclassified; k = c if none
    is. x + d is the image of F+FGSM, c is ``step_parts``.

    k = 0 is decided by the logits of the attack's own pass, at the random start x0 and in its mode
    of BatchNorm, the others in eval mode, all c - 1 for each image (Harry24k/catastrophic-
    overfitting, co_adv_trainer.py). The paper decides k = 0 at x itself.
    """

    hard_labels_only: ClassVar[str] = "it looks for the first point that is misclassified"

    step_parts: Passes = option(3, "parts into which the step is divided")

    def requires(self) -> frozenset[str]:
        return super().requires() | {"class_logits"}

    def extra_passes(self, method: Capabilities) -> Counter[Pass]:
        between = Counter({Pass(FORWARD, "eval"): self.step_parts - 1})
        return super().extra_passes(method) + between

    def make(self, batch: Batch, context: Context) -> Adversarial:
        start = self.begin(batch)
        moved, right = self.net.run(self._whole_step, start, batch, context)
        with self.net.evaluating():
            x_adv = self.net.run(self._shortest, moved, right, batch)
        return Adversarial(x_adv, batch.x, context, start, moved)

    def _whole_step(self, start: Tensor, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
        """x + d (B,C,H,W), and where the start is classified right (B,); a region."""
        gradient, logits = self.gradient_at(start, batch, context)
        return self.moved(start.detach(), gradient, batch.x, batch), logits.argmax(1) == batch.y

    @torch.no_grad()
    def _shortest(self, moved: Tensor, right: Tensor, batch: Batch) -> Tensor:
        """x' (B,C,H,W); a region."""
        step = (moved - batch.x) / self.step_parts
        x_adv = batch.x
        for k in range(1, self.step_parts):
            x_adv = torch.where(right[:, None, None, None], batch.x + k * step, x_adv)
            right = right & (self.net.logits(batch.x + k * step).argmax(1) == batch.y)
        return torch.where(right[:, None, None, None], moved, x_adv)
