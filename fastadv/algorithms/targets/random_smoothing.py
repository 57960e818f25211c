"""Random label smoothing: another split of the label in every update (LIET: Pan et al., 2025)."""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import Batch, Context, Target, required
from fastadv.declared import ShareBelowOne, option
from fastadv.engine.noise import Stream, noise_stream

OUTER, ATTACK = map(noise_stream, ("random-smoothing.outer", "random-smoothing.attack"))


class RandomSmoothing(Target):
    """Cross entropy with 1 - s for the true class, and s u_k / sum u for the others, u ~ U[0,1).

    s is ``smoothing`` (0.6 in fzjcdt/FastAT_Benchmark). u is drawn anew for each sample and update,
    and once more for an attack on the target's own loss (attack_loss "fit").
    """

    hard_labels_only: ClassVar[str] = "a soft label has no single true class to smooth"

    smoothing: ShareBelowOne = option(0.6, "probability that is taken from the true class")

    @torch.no_grad()
    def prepare_batch(self, batch: Batch, context: Context) -> Context:
        return context._replace(
            soft_targets=self._label(batch, OUTER), attack_targets=self._label(batch, ATTACK)
        )

    def _label(self, batch: Batch, stream: Stream) -> Tensor:
        """The smoothed labels (B,classes)."""
        classes = self.setup.num_classes
        drawn = (self.uniform(batch, stream, (classes,)) + 1) / 2
        right = functional.one_hot(batch.y, classes).to(drawn.dtype)
        others = drawn * (1 - right)
        total = others.sum(1, keepdim=True).clamp(min=torch.finfo(drawn.dtype).tiny)
        return (1 - self.smoothing) * right + self.smoothing * others / total

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        label = required(context.soft_targets).to(logits.dtype)
        return -(label * logits.log_softmax(1)).sum(1)
