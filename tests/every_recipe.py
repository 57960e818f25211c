"""Any recipe on the tiny staged network, with the inputs that it needs."""

from __future__ import annotations

from typing import Any

import torch
from tiny import tiny_batch
from tiny_staged import PAD, SAMPLES, StagedNet, staged_model, staged_step, view_of
from torch import Tensor

from fastadv.algorithms.resolution import resolve
from fastadv.training.training_step import Step

COUNT = 6
EPOCHS = 4
# Short attacks, and warm-ups that end within the test.
SHORTER = {"steps": 2, "replays": 2, "warmup_epochs": 1, "weight_steps": 2, "pad": PAD}
SHORTER |= {"reset_every": 2}


def step_of(
    method: str,
    model: StagedNet,
    mode: str = "eager",
    *,
    epoch_length: int = 1,
    epochs: int = EPOCHS,
    backend: Any = "aot_eager",
    **options: Any,
) -> Step:
    """A step of ``method`` in a run of ``epochs`` epochs of ``epoch_length`` batches."""
    known = resolve(method).options
    options = {name: value for name, value in SHORTER.items() if name in known} | options
    if "teachers" in known:
        options["teachers"] = [staged_model(seed).eval() for seed in (7, 8)]
    if "helper" in known:
        options["helper"] = staged_model(7).eval()
    lengths = {"total_steps": epochs * epoch_length, "steps_per_epoch": epoch_length}
    return staged_step(model, method, mode=mode, backend=backend, **lengths, **options)


def call(step: Step, update: int, count: int = COUNT) -> dict[str, Tensor]:
    """Update number ``update``, on ``count`` images and crops that no other update has."""
    return step(**arguments(step, update, count))


def arguments(step: Step, update: int, count: int = COUNT) -> dict[str, Any]:
    """What ``call`` gives to ``step``."""
    x, y, _, _ = tiny_batch(count, seed=update)
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(update))[:count]
    more: dict[str, Any] = {"view": view_of(count, update)}
    if "second_view" in step.plan.needs:
        more["second"] = tiny_batch(count, seed=100 + update)[0]
    return {"x": x, "y": y, "index": index} | more
