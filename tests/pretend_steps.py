"""Steps on the pretended GPU, and their comparison with a twin on the CPU."""

from __future__ import annotations

from typing import Any

import pretend_gpu as gpu
import torch
from every_recipe import COUNT
from pretend_gpu import Recorder
from tiny import tiny_batch
from tiny_staged import SAMPLES, view_of
from torch import Tensor, nn

from fastadv.training.captured import CapturedUpdate
from fastadv.training.training_step import Step


def on_device(model: nn.Module) -> nn.Module:
    return model.to(gpu.DEVICE)


def captured(step: Step, **options: Any) -> Step:
    step.internals.passes = CapturedUpdate(step.internals.update, Recorder(), **options)
    return step


def call(
    step: Step, update: int, count: int = COUNT, *, not_finite: bool = False, adds: bool = False
) -> dict[str, Tensor]:
    """Update number ``update`` of ``step``, on its own batch, on the device of the model; one that
    only ``adds`` its gradient does not step."""
    x, y, _, _ = tiny_batch(count, seed=update)
    x = x.to(next(step.model.parameters()).dtype) * (float("nan") if not_finite else 1.0)
    index = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(update))[:count]
    more: dict[str, Any] = {"view": view_of(count, update)}
    if "second_view" in step.plan.needs:
        more["second"] = tiny_batch(count, seed=100 + update)[0]
    if step.internals.net.device.type == gpu.NAME:
        x, y, index, more = gpu.to_device((x, y, index, more))
    return step(x, y, index, update=not adds, **more)


def assert_same_run(first: Step, second: Step, tolerance: float = 1e-10) -> None:
    """Weights, buffers and states of a step on the device and of one on the CPU agree."""
    pairs = [
        *zip(first.model.state_dict().items(), second.model.state_dict().values(), strict=True)
    ]
    pairs += zip(first.state.items(), second.state.values(), strict=True)
    for (name, own), other in pairs:
        own, other = gpu.to_host((own, other))
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance, msg=name)


def recordings(step: Step) -> list[gpu.Recording]:
    found: list[gpu.Recording] = step.internals.passes.recorder.recordings
    return found
