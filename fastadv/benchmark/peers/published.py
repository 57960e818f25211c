"""PGD adversarial training as published scripts write it, in plain PyTorch.

The shape is that of locuslab/robust_overfitting: a perturbation that is a leaf with a gradient,
``loss.backward()`` in the attack (so every weight's gradient is computed and thrown away), the
model in train mode throughout, float32. Forward passes made only for logging are left out.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastadv.benchmark.clock import seconds_per_step
from fastadv.benchmark.interleave import Candidate, warmed
from fastadv.benchmark.memory import PeakMemory
from fastadv.benchmark.ours import BATCHES, WARM_CALLS, make_optimizer
from fastadv.benchmark.setting import ALPHA, EPS, STEPS, Setting, in_turn


class PublishedLoop:
    """One PGD-AT update per call. ``helped`` adds bf16 autocast, as an experienced user would; the
    caller brings network and images to channels_last."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, helped: bool = False
    ) -> None:
        self.model, self.optimizer, self.helped = model, optimizer, helped

    def __call__(self, x: Tensor, y: Tensor, start: Tensor | None = None) -> Tensor:
        """Train on images ``x`` (B,3,H,W) in [0,1] with labels ``y``; returns the loss.

        ``start`` (B,3,H,W), in pixels, replaces the random perturbation.
        """
        self.model.train()
        delta = self._attack(x, y, start)
        loss = self._loss(torch.clamp(x + delta, 0, 1), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _attack(self, x: Tensor, y: Tensor, start: Tensor | None) -> Tensor:
        delta = torch.zeros_like(x).uniform_(-EPS, EPS) if start is None else start.clone()
        delta.data = torch.clamp(delta, 0 - x, 1 - x)
        delta.requires_grad = True
        for _ in range(STEPS):
            self._loss(x + delta, y).backward()
            gradient = delta.grad
            if gradient is None:
                raise RuntimeError("backward left no gradient of the perturbation")
            moved = torch.clamp(delta.detach() + ALPHA * gradient.sign(), -EPS, EPS)
            delta.data = torch.clamp(moved, 0 - x, 1 - x)
            gradient.zero_()
        return delta.detach()

    def _loss(self, x: Tensor, y: Tensor) -> Tensor:
        autocast = torch.autocast(x.device.type, torch.bfloat16) if self.helped else nullcontext()
        with autocast:
            return functional.cross_entropy(self.model(x), y)


def published_candidate(setting: Setting, *, helped: bool = False) -> Candidate:
    """The loop as a candidate; float32, or ``helped`` with channels_last and bf16 autocast.

    It changes no process-wide setting, so it may run in the process that compiles ours.
    """
    device = torch.device(setting.device)
    memory = PeakMemory(device)
    model = setting.make_model(channels_last=helped)
    loop = PublishedLoop(model, make_optimizer(model), helped=helped)
    batches = in_turn(setting.batches(BATCHES, channels_last=helped))

    def call() -> None:
        batch = next(batches)
        loop(batch.x, batch.y)

    warm = warmed(call, device, memory, WARM_CALLS)
    name = "helped bf16" if helped else "published fp32"
    facts = {
        "by": "helped" if helped else "published",
        "method": "pgd",
        "dtype": "bf16" if helped else "fp32",
        "mode": "eager",
        "layout": "channels_last" if helped else "contiguous",
        "attack_bn": "train",
    }
    turn = partial(seconds_per_step, call, device)
    return Candidate(name, turn, warm, facts, memory.bytes(), once=call)
