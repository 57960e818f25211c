"""SAT: labels move towards the network's predictions (Huang et al., 2020)."""

from collections.abc import Iterable
from typing import ClassVar

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
from fastadv.declared import NonNegative, Share, option


class SelfAdaptive(Target):
    """w_i * cross entropy with t_i, after t_i <- m t_i + (1 - m) softmax(z_i), detached.

    z_i are the logits that the objective fits, from the outer pass in training mode: natural ones
    for TRADES (LayneH/self-adaptive-training), f(x') for cross entropy. For the latter the
    memorization paper (Table 2) reports a result, and no code is published; it needs no further
    pass. m is ``sat_momentum``. w_i = max t_i, scaled to mean 1 over the batch. t_i begins as the
    hard label. Before epoch ``sat_start`` (from 0; below 1 a fraction of the run, by default the
    70th of 100 epochs) the hard label is fitted and t does not change. The attack does not change.
    """

    hard_labels_only: ClassVar[str] = "its stored labels begin as hard ones"

    sat_momentum: Share = option(0.9, "momentum of the targets")
    sat_start: NonNegative = option(
        0.69, "epoch, counted from 0, from which targets move; below 1: share of the run"
    )

    def sample_state(self) -> tuple[str, ...]:
        return ("targets",)

    def conflicts(self, method: Capabilities) -> Iterable[Conflict]:
        if len(method.fits) > 1:
            yield Conflict(
                "objective",
                "a label moves towards the fitted prediction, and this objective fits two.",
            )
        if method.updates_per_batch > 1:
            yield Conflict("adversary", SEVERAL)

    def refuses_accumulation(self) -> str | None:
        return "the weights of the images of a call have mean 1"

    def follows_epochs(self) -> bool:
        return self.sat_start > 0

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        self._start = epoch_of(self.sat_start, setup, "sat_start")
        rows = sample_count(setup.num_samples, "Self-adaptive training")
        dtype = torch.promote_types(setup.dtype, torch.float32)
        # A row of zeros is a sample not seen yet; its label is known only with its first batch.
        self.targets = torch.zeros(rows, setup.num_classes, device=setup.device, dtype=dtype)
        self.state = {"targets": self.targets}

    def schedule(self, update: int, epoch: float) -> None:
        self.active = int(epoch) >= self._start

    @torch.no_grad()
    def prepare_batch(self, batch: Batch, context: Context) -> Context:
        if not self.active:
            return context
        rows = self.targets[batch.index]
        label = functional.one_hot(batch.y, rows.shape[1]).to(rows.dtype)
        seen = rows.sum(1, keepdim=True) > 0
        return context._replace(soft_targets=torch.where(seen, rows, label))

    def _moved(self, logits: Tensor, context: Context) -> Tensor:
        old = required(context.soft_targets)
        now = logits.detach().softmax(1).to(old.dtype)
        return self.sat_momentum * old + (1 - self.sat_momentum) * now

    def fit(self, logits: Tensor, y: Tensor, context: Context) -> Tensor:
        if not self.active:
            return functional.cross_entropy(logits, y, reduction="none")
        target = self._moved(logits, context).to(logits.dtype)
        weight = target.amax(1)
        weight = weight * len(weight) / weight.sum()
        return -weight * (target * logits.log_softmax(1)).sum(1)

    @torch.no_grad()
    def after(self, outcome: Outcome, ok: Tensor) -> None:
        if not self.active:
            return
        batch, outputs = outcome.batch, outcome.outputs
        fitted = outputs.adversarial
        if self.setup.method.fits[0] == "natural" and outputs.natural is not None:
            fitted = outputs.natural
        rows = self._moved(fitted, outputs.context)
        self.targets[batch.index] = torch.where(ok, rows, self.targets[batch.index])
