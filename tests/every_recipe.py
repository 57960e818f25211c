"""Any recipe on the tiny staged network, with whatever inputs it asks for."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_batch
from tiny_staged import PAD, SAMPLES, StagedNet, staged_model, staged_step, view_of
from torch import Tensor

from fastadv.plan import resolve
from fastadv.training_step import Step

COUNT = 6
# Short attacks, and warm-ups that end within the test.
SHORTER = {"steps": 2, "replays": 2, "warmup_epochs": 1, "weight_steps": 2, "pad": PAD}
SHORTER |= {"reset_every": 2}


def step_of(method: str, model: StagedNet, mode: str = "eager") -> Step:
    """A step of ``method`` in a run of four epochs of one batch each."""
    known = resolve(method).options
    options: dict[str, Any] = {name: value for name, value in SHORTER.items() if name in known}
    if "teachers" in known:
        options["teachers"] = [staged_model(seed).eval() for seed in (7, 8)]
    lengths = {"total_steps": 4, "steps_per_epoch": 1}
    return staged_step(model, method, mode=mode, **lengths, **options)


def call(step: Step, update: int) -> dict[str, Tensor]:
    """Update number ``update``, on a batch of its own with its own crop."""
    x, y, _, _ = tiny_batch(COUNT, seed=update)
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(update))[:COUNT]
    more: dict[str, Any] = {"view": view_of(COUNT, update)}
    if "second_view" in step.plan.needs:
        more["second"] = tiny_batch(COUNT, seed=100 + update)[0]
    return step(x, y, index, **more)
