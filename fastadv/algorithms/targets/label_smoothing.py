"""Label smoothing: part of the label goes to the other classes (Szegedy et al., 2016)."""

from typing import Literal

from torch import Tensor

from fastadv.algorithms.contract import Context, Target
from fastadv.declared import ShareBelowOne, option


def smoothed_ce(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """The cross entropy (B,) of ``logits`` (B,classes) with the label 1-s for class y (B,) and
    s/(classes-1) for every other class, s = ``smoothing``. For soft labels q (B,classes) the label
    is (1-s) q + s/(classes-1) (1-q), their mixture of these."""
    log_p = logits.log_softmax(1)
    if y.ndim == 1:
        right = log_p.gather(1, y[:, None]).squeeze(1)
    else:
        right = (y * log_p).sum(1)
    other = (log_p.sum(1) - right) / (logits.shape[1] - 1)
    return -(1 - smoothing) * right - smoothing * other


class LabelSmoothing(Target):
    """The true class gets 1 - s, every other s/(classes - 1); the attack sees the hard label.

    s is ``smoothing``, as in "Bag of Tricks for AT" (Pang et al., 2021). With ``smooth_over`` "all"
    every class gets s/classes and the true one 1 - s in addition: torch's own smoothing. A soft
    label becomes the mixture of such labels. The memorization paper (Table 2) does not state its s.
    """

    smoothing: ShareBelowOne = option(0.1, "probability that is taken from the true class")
    smooth_over: Literal["others", "all"] = option(
        "others", "classes that share this probability: the others, or all"
    )

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        classes = logits.shape[1]
        share = 1.0 if self.smooth_over == "others" else (classes - 1) / classes
        return smoothed_ce(logits, y, self.smoothing * share)
