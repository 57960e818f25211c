"""ConvergeSmooth: a natural loss that changes no faster than a stride (Zhao et al., ICCV 2023)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fastadv.algorithms.contract import (
    Adversarial,
    Batch,
    Context,
    Outcome,
    Outputs,
    Regularizer,
    Setup,
    required,
)
from fastadv.declared import NonNegative, option

HISTORY = "convergence"
FIRST, LAST = 2, 1  # epochs at the beginning and at the end of a run without the term


class SmoothConvergence(Regularizer):
    """sign(L - P) L where |L - P| is above the stride, otherwise 0.

    L is the mean of the target's loss over the batch, at the centre of the ball, P the mean of L
    over the epoch before, at first 0. The first two epochs and the last have no term
    (fzjcdt/FastAT_Benchmark, fast_at/fgsm_rs_cs.py). The stride is constant, as in that benchmark's
    configurations; the paper also has one that follows the change of P.

    With several processes each compares the mean loss of its own images.
    """

    rank_local_state: ClassVar[tuple[str, ...]] = (HISTORY,)

    loss_stride: NonNegative = option(0.03, "largest change of the natural loss without a penalty")

    def requires(self) -> frozenset[str]:
        return frozenset({"natural_logits_train"})

    def refuses_accumulation(self) -> str:
        return "the sign of its term follows the mean loss of a call"

    def follows_epochs(self) -> bool:
        return True

    def prepare(self, setup: Setup) -> None:
        super().prepare(setup)
        # The sum of the losses of this epoch, their number, and the mean of the epoch before.
        self.history = torch.zeros(3, device=setup.device, dtype=torch.float64)
        self.gate = torch.zeros((), device=setup.device, dtype=setup.dtype)
        # On the CPU, where reading it stalls no device.
        self.epoch = torch.zeros((), dtype=torch.int64)
        self.state = {HISTORY: self.history, "convergence_epoch": self.epoch}

    def schedule(self, update: int, epoch: float) -> None:
        super().schedule(update, epoch)
        now, epochs = int(epoch), self.setup.total_epochs
        if now != int(self.epoch):
            total, count, _ = self.history
            later = torch.zeros_like(self.history)
            later[2] = total / count.clamp(min=1)
            self.history.copy_(torch.where(self.setup.sound() & (count > 0), later, self.history))
            self.epoch.fill_(now)
        begun = now >= FIRST and (epochs is None or now < epochs - LAST)
        usual = super().weight()
        self.gate.copy_(usual) if isinstance(usual, Tensor) else self.gate.fill_(usual)
        self.gate.mul_(float(begun))

    def weight(self) -> Tensor:
        return self.gate

    def _loss(self, logits: Tensor, batch: Batch, context: Context) -> Tensor:
        return self.setup.fit(logits, batch.y, context).mean()

    def term(self, batch: Batch, attacked: Adversarial, x_adv: Tensor, outputs: Outputs) -> Tensor:
        loss = self._loss(required(outputs.natural), batch, outputs.natural_context)
        away = loss.detach() - self.history[2]
        return torch.where(away.abs() > self.loss_stride, away.sign(), 0.0).to(loss.dtype) * loss

    def after(self, outcome: Outcome, ok: Tensor) -> None:
        batch, outputs = outcome.batch, outcome.outputs
        loss = self._loss(required(outputs.natural), batch, outputs.natural_context).double()
        seen = torch.stack([loss, torch.ones_like(loss), torch.zeros_like(loss)])
        self.history.add_(torch.where(ok, len(batch.x) * seen, 0.0))
