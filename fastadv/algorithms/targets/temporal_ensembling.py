"""TE: predictions are held close to their own running average (memorization paper, Eq. 7)."""

from collections.abc import Iterable, Mapping
from math import exp
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.algorithms.contract import (
    Batch,
    Capabilities,
    Conflict,
    Context,
    Outcome,
    Setup,
    Target,
    required,
)
from fastadv.algorithms.phases import epoch_of
from fastadv.algorithms.sample_state import sample_count
from fastadv.algorithms.targets.predictions import SEVERAL
from fastadv.declared import NonNegative, ShareBelowOne, option


def ramp(epoch: int, start: float, end: float) -> float:
    """exp(-5 (1 - t)^2), where t rises from 0 at ``start`` to 1 at ``end`` (epochs); 0 before
    ``start``, 1 after ``end``."""
    if epoch < start:
        return 0.0
    done = min((epoch - start) / (end - start), 1.0) if end > start else 1.0
    return exp(-5 * (1 - done) ** 2)


class TemporalEnsembling(Target):
    """The outer loss and the attack's get the term + w_e |p - p^_i|_2^2 per sample.

    P_i <- m P_i + (1 - m) softmax(f(x_i)), f(x_i) the logits of the augmented image with running
    BatchNorm statistics, before the attack; p^_i = P_i / sum(P_i) is the bias-corrected average.
    m is ``te_momentum``. w_e = ``te_weight`` * ramp(e), with e the epoch from 0 and the ramp from
    ``te_start`` to ``te_end``; before ``te_start`` nothing is averaged. Values below 1 are
    fractions of the run: the defaults are the 90th and 150th of 200 epochs
    (dongyp13/memorization-AT). The weight multiplies the sum over classes, as printed. The code's
    300 multiplies a mean over classes, the same as 30 here for ten classes; for the 100 of
    CIFAR-100 its 3000 is the same 30.

    In the attack p is p(x'). In the outer loss ``te_on="code"`` takes the predictions that the
    objective fits (natural ones for TRADES); ``"paper"`` always takes p(x').
    """

    # Measured: under a triangular cycle the published 30, which met a tenfold lower learning rate,
    # drives a short run to a constant prediction; 3 does not.
    on_data: ClassVar[Mapping[str, Mapping[str, Any]]] = {"digits": {"te_weight": 3.0}}

    suspects: ClassVar[tuple[str, ...]] = ("te_weight",)

    te_weight: NonNegative = option(
        30.0, "final weight of the distance to the averaged predictions"
    )
    te_momentum: ShareBelowOne = option(0.9, "momentum of the averaged predictions")
    te_start: NonNegative = option(
        0.445,
        "epoch, counted from 0, at which the weight begins to rise; below 1: share of the run",
    )
    te_end: NonNegative = option(
        0.745, "epoch, counted from 0, at which the weight is full; below 1: share of the run"
    )
    te_on: Literal["code", "paper"] = option(
        "code",
        "predictions that are held to the average: the fitted (code) or the adversarial (paper)",
    )

    def sample_state(self) -> tuple[str, ...]:
        return ("predictions",)

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_eval"})

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if method.updates_per_batch > 1:
            yield Conflict("adversary", SEVERAL)

    def follows_epochs(self) -> bool:
        return self.te_start > 0 or self.te_end > 0

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._start = epoch_of(self.te_start, setup, "te_start")
        self._end = epoch_of(self.te_end, setup, "te_end")
        rows = sample_count(setup.num_samples, "Temporal ensembling")
        dtype = torch.promote_types(setup.dtype, torch.float32)
        self._weight = torch.zeros((), device=setup.device, dtype=dtype)
        self.predictions = torch.zeros(rows, setup.num_classes, device=setup.device, dtype=dtype)
        self.state = {"predictions": self.predictions}

    def schedule(self, update: int, epoch: float) -> None:
        self.active = int(epoch) >= self._start
        self._weight.fill_(self.te_weight * ramp(int(epoch), self._start, self._end))

    @torch.no_grad()
    def prepare_batch(self, batch: Batch, context: Context) -> Context:
        if not self.active:
            return context
        now = required(context.natural_logits_eval).softmax(1).to(self.predictions.dtype)
        rows = self.te_momentum * self.predictions[batch.index] + (1 - self.te_momentum) * now
        prediction = rows / rows.sum(1, keepdim=True)
        return context._replace(target_rows=rows, soft_targets=prediction)

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        return functional.cross_entropy(logits, y, reduction="none")

    def penalty(self, fitted: Tensor, adversarial: Tensor, context: Context) -> Tensor | None:
        if not self.active:
            return None
        return self._distance(fitted if self.te_on == "code" else adversarial, context)

    def _distance(self, logits: Tensor, context: Context) -> Tensor:
        apart = logits.softmax(1) - required(context.soft_targets).to(logits.dtype)
        return self._weight.to(logits.dtype) * apart.pow(2).sum(1)

    @torch.no_grad()
    def after(self, outcome: Outcome, ok: Tensor) -> None:
        if self.active:
            index = outcome.batch.index
            rows = required(outcome.outputs.context.target_rows)
            self.predictions[index] = torch.where(ok, rows, self.predictions[index])
