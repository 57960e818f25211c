"""fastadv's own steps as candidates."""

from __future__ import annotations

from functools import partial
from itertools import cycle
from typing import Any

import torch

from fastadv.algorithms.contract import Layers
from fastadv.benchmark.clock import seconds_per_step
from fastadv.benchmark.interleave import Candidate, warmed
from fastadv.benchmark.memory import PeakMemory
from fastadv.benchmark.setting import Setting
from fastadv.benchmark.specs import Spec
from fastadv.errors import UserError, unknown
from fastadv.training.entry import step
from fastadv.training.mode import WORTH_COMPILING_STEPS
from fastadv.training.training_step import Step

WARM_CALLS = 3
DTYPES = ("fp32", "bf16", "fp16")
BATCHES = 4
LONG_RUN = 100_000  # steps: long enough that compiling pays off
SHORT_RUN = WORTH_COMPILING_STEPS - 1  # steps: so short that a captured step is not compiled
# The engine's modes, and what its "captured" is in a short run: graphs of the eager kernels.
CAPTURED_EAGER = "captured-eager"
MODES = ("eager", "compiled", "captured", CAPTURED_EAGER)
# A learning rate at which training on random labels does not diverge within one measurement.
LR = 1e-3


def make_optimizer(
    model: torch.nn.Module, *, fused: bool = False, layers: Layers | None = None
) -> torch.optim.Optimizer:
    """The published SGD: momentum 0.9, weight decay 5e-4; ``layers`` selects the trained groups."""
    groups = (layers or Layers()).optimizer_groups(model, LR)
    return torch.optim.SGD(groups, lr=LR, momentum=0.9, weight_decay=5e-4, fused=fused or None)


def make_step(
    setting: Setting, spec: Spec, dtype: str, mode: str, total_steps: int = LONG_RUN
) -> Step:
    """A fastadv step as a user would make it, in channels_last."""
    model = setting.make_model(channels_last=True)
    plan = spec.plan()
    fused = setting.device.startswith("cuda")
    optimizer = make_optimizer(model, fused=fused, layers=plan.layers)
    options: dict[str, Any] = {} if dtype == "fp32" else {"amp": True, "amp_dtype": dtype}
    if plan.options.get("teachers", "") is None:
        options["teachers"] = [setting.make_model(channels_last=True) for _ in range(2)]
    if plan.options.get("helper", "") is None:
        options["helper"] = setting.make_model(channels_last=True)
    return step(
        model,
        optimizer,
        spec.method,
        mode=mode,
        fused_norm=spec.fused_norm,
        num_samples=BATCHES * setting.batch_size,
        num_classes=setting.num_classes,
        total_steps=total_steps,
        steps_per_epoch=total_steps,
        seed=setting.seed,
        **options,
        **spec.chosen,
    )


def require_mode(mode: str, device: torch.device) -> None:
    """Raise ``UserError`` for a mode that is not of ``MODES`` or that ``device`` does not have."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    if mode.startswith("captured") and device.type != "cuda":
        raise UserError(f"{mode} is a mode of CUDA devices; on a CPU use eager or compiled.")


def engine_mode(mode: str) -> tuple[str, int]:
    """The engine's name for a mode of ``MODES``, and how many steps a run in it has."""
    return ("captured", SHORT_RUN) if mode == CAPTURED_EAGER else (mode, LONG_RUN)


def our_candidate(setting: Setting, spec: Spec, dtype: str, mode: str) -> Candidate:
    """One method in one precision and mode of ``MODES``, warmed up.

    Raises ``UserError`` for a mode this machine or this version does not have.
    """
    device = torch.device(setting.device)
    require_mode(mode, device)
    memory = PeakMemory(device)
    training = make_step(setting, spec, dtype, *engine_mode(mode))
    inputs: list[dict[str, Any]] = [
        {"x": batch.x, "y": batch.y, "index": batch.index, "second": batch.x.flip(-1)}
        for batch in setting.batches(BATCHES, channels_last=True)
    ]
    batches = cycle(inputs)

    def call() -> None:
        training(**next(batches))

    warm = warmed(call, device, memory, WARM_CALLS)
    return Candidate(
        f"fastadv {spec} {dtype} {mode}",
        partial(seconds_per_step, call, device),
        warm,
        {
            "by": "fastadv",
            "method": str(spec),
            "dtype": dtype,
            "mode": mode,
            "fused_norm": training.internals.net.fused_norm,
            "layout": "channels_last",
            "attack_bn": training.plan.adversary.attack_bn,
        },
        memory.bytes(),
        training.check,
        call,
    )
