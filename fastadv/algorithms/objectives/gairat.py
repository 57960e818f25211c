"""GAIRAT: samples near the decision boundary weigh more (Zhang et al., 2021)."""

from collections.abc import Iterable
from typing import ClassVar

from torch import Tensor

from fastadv.algorithms.contract import (
    Capabilities,
    Conflict,
    Fit,
    Objective,
    Outputs,
    Setup,
    required,
)
from fastadv.algorithms.phases import epoch_of
from fastadv.declared import AnyNumber, NonNegative, option


class Gairat(Objective):
    """w_i fit(f(x'_i), y_i), w_i ~ (1 + tanh(lambda + 5 (1 - 2 kappa_i / K))) / 2, mean 1.

    kappa_i is the number of the K attack steps before which sample i was classified right; lambda
    is ``gairat_lambda``. All weights are equal before epoch ``gairat_start`` (from 0; a number
    below 1 is a fraction of the run; the released code begins with the 60th of 120 epochs, counted
    from 1).
    """

    hard_labels_only: ClassVar[str] = "it counts the steps at which a sample was classified right"

    gairat_start: NonNegative = option(
        59 / 120,
        "epoch, counted from 0, from which samples are weighted; below 1: share of the run",
    )
    gairat_lambda: AnyNumber = option(-1.0, "shift inside the tanh of the samples' weights")

    def requires(self) -> frozenset[str]:
        return frozenset({"correct_at_each_step", "class_logits"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if not method.counts_correct:
            yield Conflict(
                "adversary",
                "its weights are a function of the steps of PGD at which a sample was still "
                "classified right; this adversary takes no such steps.",
            )

    def refuses_accumulation(self) -> str | None:
        return "the weights of the images of a call have mean 1"

    def follows_epochs(self) -> bool:
        return self.gairat_start > 0

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._start = epoch_of(self.gairat_start, setup, "gairat_start")

    def schedule(self, update: int, epoch: float) -> None:
        self.active = int(epoch) >= self._start

    def per_sample(self, outputs: Outputs, y: Tensor, fit: Fit) -> Tensor:
        losses = fit(outputs.adversarial, y, outputs.context)
        if not self.active:
            return losses
        share = required(outputs.context.correct_share).to(losses.dtype)
        # This form of (1 + tanh a)/2 keeps the digits of a weight of 1e-5 in float32.
        weights = (2 * (self.gairat_lambda + 5 * (1 - 2 * share))).sigmoid()
        return losses * (weights * len(weights) / weights.sum())
