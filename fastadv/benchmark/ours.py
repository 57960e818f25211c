"""fastadv's own steps as candidates."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fastadv.benchmark.clock import seconds
from fastadv.benchmark.interleave import Candidate, warmed
from fastadv.benchmark.memory import PeakMemory
from fastadv.benchmark.setting import Setting, in_turn
from fastadv.benchmark.specs import Spec
from fastadv.errors import UserError
from fastadv.training_step import Step, step

WARM_CALLS = 3
DTYPES = ("fp32", "bf16", "fp16")
BATCHES = 4
# A rate at which random labels do not tear the weights apart within one measurement.
LR = 1e-3


def make_optimizer(model: torch.nn.Module, *, fused: bool = False) -> torch.optim.Optimizer:
    """The published SGD: momentum 0.9, weight decay 5e-4."""
    return torch.optim.SGD(
        model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4, fused=fused or None
    )


def make_step(setting: Setting, spec: Spec, dtype: str, mode: str) -> Step:
    """A fastadv step as a user would make it, in channels_last."""
    model = setting.make_model(channels_last=True)
    optimizer = make_optimizer(model, fused=setting.device.startswith("cuda"))
    precision: dict[str, Any] = {} if dtype == "fp32" else {"amp": True, "amp_dtype": dtype}
    return step(
        model,
        optimizer,
        spec.method,
        mode=mode,
        num_samples=BATCHES * setting.batch_size,
        num_classes=setting.num_classes,
        total_steps=100_000,
        steps_per_epoch=100_000,
        seed=setting.seed,
        **precision,
        **spec.chosen,
    )


def our_candidate(setting: Setting, spec: Spec, dtype: str, mode: str) -> Candidate:
    """One method in one precision and mode, warmed up.

    Raises ``UserError`` for a mode this machine or this version does not have.
    """
    device = torch.device(setting.device)
    if mode == "captured" and device.type != "cuda":
        raise UserError("captured is a mode of CUDA devices; on a CPU use eager or compiled.")
    memory = PeakMemory(device)
    training = make_step(setting, spec, dtype, mode)
    batches = in_turn(setting.batches(BATCHES, channels_last=True))

    def call() -> None:
        batch = next(batches)
        training(batch.x, batch.y, batch.index)

    warm = warmed(call, device, memory, WARM_CALLS)
    return Candidate(
        f"fastadv {spec} {dtype} {mode}",
        partial(seconds, call, device),
        warm,
        {
            "by": "fastadv",
            "method": str(spec),
            "dtype": dtype,
            "mode": mode,
            "layout": "channels_last",
            "attack_bn": training.plan.adversary.attack_bn,
        },
        memory.bytes(),
        training.check,
    )
