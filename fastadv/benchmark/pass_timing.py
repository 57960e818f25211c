"""Single passes as candidates, in the same mode as the steps they are parts of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastadv.benchmark.clock import captured, seconds
from fastadv.benchmark.geometry import FORWARD, INPUT_GRADIENT, TRAINING, pass_bn
from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.limits import TORCH_DTYPES
from fastadv.benchmark.ours import BATCHES, WARM_CALLS
from fastadv.benchmark.setting import Batch, Setting
from fastadv.engine import guard
from fastadv.engine.precision import autocast


def pass_name(kind: str, dtype: str, mode: str, bn: str) -> str:
    """The name of a pass among the candidates."""
    return f"pass: {kind} {dtype} {mode} bn={bn}"


def pass_candidate(setting: Setting, kind: str, dtype: str, mode: str, bn: str) -> Candidate:
    """A forward, an input gradient or a training pass alone, BatchNorm in mode ``bn``.

    The parameters ask for gradients in the training pass only.
    """
    device = torch.device(setting.device)
    model = setting.make_model(channels_last=True).train(bn == "train")
    work = _pass(model, kind, device, None if dtype == "fp32" else TORCH_DTYPES[dtype])
    batches = setting.batches(BATCHES, channels_last=True)
    calls = _in_mode(work, model, kind, mode, batches)
    warm = [seconds(calls[number % BATCHES], device) for number in range(WARM_CALLS)]
    position = 0

    def turn() -> float:
        nonlocal position
        position += 1
        return seconds(calls[position % BATCHES], device)

    facts = {"by": "fastadv", "pass": kind, "dtype": dtype, "mode": mode, "attack_bn": bn}
    return Candidate(pass_name(kind, dtype, mode, bn), turn, warm, facts)


def sum_of_passes(
    times: Mapping[str, Sequence[float]],
    passes: Mapping[str, int],
    dtype: str,
    mode: str,
    attack_bn: str,
) -> list[float]:
    """Seconds of a step's passes added up, turn by turn."""
    columns = [
        [count * value for value in times[pass_name(kind, dtype, mode, pass_bn(kind, attack_bn))]]
        for kind, count in passes.items()
        if count
    ]
    return [sum(turn) for turn in zip(*columns, strict=True)]


def _pass(
    model: nn.Module, kind: str, device: torch.device, dtype: torch.dtype | None
) -> Callable[[Tensor, Tensor], Any]:
    parameters = list(model.parameters())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        with autocast(device, dtype):
            logits = model(x)
        return functional.cross_entropy(logits.float(), y)

    def forward(x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return loss(x, y)

    def input_gradient(x: Tensor, y: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(loss(x, y), [x])[0]

    def training(x: Tensor, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss(x, y), parameters))

    return {FORWARD: forward, INPUT_GRADIENT: input_gradient}.get(kind, training)


def _in_mode(
    work: Callable[[Tensor, Tensor], Any],
    model: nn.Module,
    kind: str,
    mode: str,
    batches: Sequence[Batch],
) -> list[Callable[[], Any]]:
    """One call a batch: as written, compiled, or compiled and replayed as a CUDA graph."""
    run = work
    if mode != "eager":
        run = torch.compile(work, fullgraph=True, dynamic=False)

    def on(batch: Batch) -> Callable[[], Any]:
        def call() -> Any:
            frozen: AbstractContextManager[None]
            frozen = nullcontext() if kind == TRAINING else guard.frozen_parameters(model)
            with frozen, torch._dynamo.config.patch(trace_autograd_ops=True):
                return run(batch.x, batch.y)

        return captured(call) if mode == "captured" else call

    return [on(batch) for batch in batches]
