"""One captured step against an eager one, and the memory of steps."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from fastadv.benchmark.installation.finding import REPORT, SMALLER, Check, Failed
from fastadv.benchmark.ours import engine_mode
from fastadv.engine.model.precision import tf32
from fastadv.models import build_model
from fastadv.training.entry import step
from fastadv.training.training_step import Step

CAPTURED = "captured-eager"  # the graphs without a compiler, which would take the whole minute
UPDATES = 3  # the first one records, the others replay
# Both run the same kernels: float64 by PyTorch, float32 by Triton where a kernel exists. In float32
# a convolution by another algorithm may turn the sign of a pixel's gradient.
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
WARM, STEPS = 5, 20
NETWORK = {"width": 16}  # of the steps whose memory is looked at
MOST = 1.5  # of the memory of a plain forward and backward pass
Prepare = Callable[[Step], Step]


def captured_checks(
    device: torch.device, mode: str = CAPTURED, prepare: Prepare = lambda made: made
) -> Iterator[Check]:
    """The weights after three PGD updates in ``mode`` against eager ones. ``prepare`` may change
    the step of ``mode``, for a device that is not one."""
    for dtype, tolerance in TOLERANCES.items():
        typed = str(dtype).removeprefix("torch.")
        yield Check(
            f"captured step, {typed}",
            partial(_same, device, mode, prepare, dtype, tolerance),
            seconds=5.0,
        )


def _same(
    device: torch.device, mode: str, prepare: Prepare, dtype: torch.dtype, tolerance: float
) -> str:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    try:
        with tf32(False):
            eager = _weights(device, "eager", lambda made: made, dtype)
            other = _weights(device, mode, prepare, dtype)
    finally:
        torch.backends.cudnn.deterministic = before
    off, where = max((_distance(other[name], value), name) for name, value in eager.items())
    if off > tolerance:
        raise Failed(
            f"differs from eager by {off:.1e} in {where} after {UPDATES} updates",
            f"train with --mode eager; {REPORT}",
        )
    return f"as eager after {UPDATES} updates (off by {off:.0e})"


def _distance(found: Tensor, expected: Tensor) -> float:
    off = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return math.inf if math.isnan(off) else off  # a NaN is larger than no number


def _weights(
    device: torch.device, mode: str, prepare: Prepare, dtype: torch.dtype
) -> dict[str, Tensor]:
    made, model = _step(device, mode, dtype, width=4, depths=(1, 1, 1, 1), steps=2)
    made = prepare(made)
    generator = torch.Generator().manual_seed(1)
    for _ in range(UPDATES):
        x = torch.rand(8, 3, 16, 16, generator=generator, dtype=torch.float64)
        y = torch.randint(10, (8,), generator=generator)
        x = x.to(device, dtype).contiguous(memory_format=torch.channels_last)
        made(x, y.to(device), torch.arange(8).to(device))
    made.check()
    return {name: value.detach().cpu().double() for name, value in model.named_parameters()}


def _step(
    device: torch.device, mode: str, dtype: torch.dtype, *, steps: int, **network: Any
) -> tuple[Step, torch.nn.Module]:
    torch.manual_seed(0)
    model = build_model("preact_resnet18", **network).to(dtype=dtype).to(device)
    model = cast(Any, model).to(memory_format=torch.channels_last)
    fused = True if device.type == "cuda" else None  # then its update is in the graph as well
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=fused)
    own_mode, total = engine_mode(mode)
    made = step(
        model, optimizer, "pgd", mode=own_mode, fused_norm="off", num_classes=10,
        total_steps=total, steps_per_epoch=total, steps=steps, eps=8 / 255, alpha=2 / 255,
    )  # fmt: skip
    return made, model


@dataclass(frozen=True)
class Meter:
    """How memory of the device is read: bytes now, the peak since ``forget``."""

    allocated: Callable[[], int]
    peak: Callable[[], int]
    forget: Callable[[], None]


def cuda_meter(device: torch.device) -> Meter:
    """The allocator of a CUDA device."""
    return Meter(
        lambda: torch.cuda.memory_allocated(device),
        lambda: torch.cuda.max_memory_allocated(device),
        lambda: torch.cuda.reset_peak_memory_stats(device),
    )


def memory_checks(
    device: torch.device,
    meter: Meter,
    batch: int = 64,
    modes: tuple[str, ...] = ("eager", CAPTURED),
) -> Iterator[Check]:
    """The peak of a step against a plain pass, and what steps leave behind in each mode."""
    yield Check("memory of a step", lambda: _peak(device, meter, batch))
    for mode in modes:
        yield Check(
            f"leaks in {STEPS} steps, {'captured' if mode == CAPTURED else mode}",
            partial(_leak, device, meter, batch, mode),
            seconds=4.0,
        )


def _batch(device: torch.device, batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, 32, 32, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    return x.to(device).contiguous(memory_format=torch.channels_last), y.to(device)


def _peak(device: torch.device, meter: Meter, batch: int) -> str:
    made, model = _step(device, "eager", torch.float32, steps=2, **NETWORK)
    x, y = _batch(device, batch)

    def plain() -> None:
        loss = functional.cross_entropy(model(x), y)
        torch.autograd.grad(loss, list(model.parameters()))

    def peak_of(call: Callable[[], object]) -> int:
        call()
        gc.collect()
        before = meter.allocated()
        meter.forget()
        call()
        return meter.peak() - before

    expected, found = peak_of(plain), peak_of(lambda: made(x, y))
    words = f"{found / 2**20:.0f} MiB, a plain pass {expected / 2**20:.0f} MiB"
    if found > MOST * expected:
        raise Failed(f"{words}: more than {MOST} times as much", f"{SMALLER}; {REPORT}")
    return words


def _leak(device: torch.device, meter: Meter, batch: int, mode: str) -> str:
    made, _ = _step(device, mode, torch.float32, steps=2, **NETWORK)
    x, y = _batch(device, batch)

    def after(steps: int) -> int:
        for _ in range(steps):
            made(x, y)
        made.check()
        gc.collect()
        return meter.allocated()

    before = after(WARM)
    grown = after(STEPS) - before
    if grown > 0:
        raise Failed(
            f"{grown / STEPS / 1024:.1f} KiB a step stay allocated",
            f"long runs will end out of memory; {REPORT}",
        )
    return f"none after {STEPS} steps"
