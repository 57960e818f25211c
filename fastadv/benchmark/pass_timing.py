"""Single passes as candidates, in the same mode as the steps they are parts of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.contract.passes import (
    DOUBLE_BACKWARD,
    FORWARD,
    INPUT_GRADIENT,
    SHARED,
    TRAINING,
    Pass,
)
from fastadv.benchmark.clock import captured, seconds, seconds_per_step
from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.limits import TORCH_DTYPES
from fastadv.benchmark.ours import BATCHES, CAPTURED_EAGER, WARM_CALLS
from fastadv.benchmark.setting import BenchBatch, Setting
from fastadv.engine.gradient import leaf
from fastadv.engine.model import guard
from fastadv.engine.model.double_backward import cheap_double_backward
from fastadv.engine.model.precision import autocast


def pass_name(kind: str, dtype: str, mode: str, bn: str) -> str:
    """The name of a pass among the candidates."""
    return f"pass: {kind} {dtype} {mode} bn={bn}"


def pass_candidate(setting: Setting, kind: str, dtype: str, mode: str, bn: str) -> Candidate:
    """One of ``contract.passes``'s kinds of pass alone, BatchNorm in mode ``bn``.

    The parameters require gradients if the pass computes those of the weights.
    """
    device = torch.device(setting.device)
    model = setting.make_model(channels_last=True).train(bn == "train")
    work = _pass(model, kind, device, None if dtype == "fp32" else TORCH_DTYPES[dtype])
    batches = setting.batches(BATCHES, channels_last=True)
    calls = _in_mode(work, model, kind, mode, batches)
    warm = [seconds(calls[number % BATCHES], device) for number in range(WARM_CALLS)]
    rounds = cycle(calls)

    def call() -> None:
        next(rounds)()

    facts = {"by": "fastadv", "pass": kind, "dtype": dtype, "mode": mode, "attack_bn": bn}
    turn = partial(seconds_per_step, call, device)
    return Candidate(pass_name(kind, dtype, mode, bn), turn, warm, facts, once=call)


def sum_of_passes(
    times: Mapping[str, Sequence[float]],
    passes: Mapping[Pass, int],
    dtype: str,
    mode: str,
) -> list[float]:
    """Seconds of a step's passes added up, turn by turn."""
    columns = [
        [count * value for value in times[pass_name(kind, dtype, mode, bn)]]
        for (kind, bn), count in passes.items()
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
        x = leaf(x)
        return torch.autograd.grad(loss(x, y), [x])[0]

    def training(x: Tensor, y: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss(x, y), parameters))

    def shared(x: Tensor, y: Tensor) -> list[Tensor]:
        x = leaf(x)
        value = loss(x, y)
        taken = torch.autograd.grad(value, [x], retain_graph=True)
        return [*taken, *torch.autograd.grad(value, parameters)]

    def double_backward(x: Tensor, y: Tensor) -> list[Tensor]:
        x = leaf(x)
        value = loss(x, y)
        (taken,) = torch.autograd.grad(value, [x], create_graph=True)
        return list(torch.autograd.grad(value + taken.square().sum(), parameters))

    return {
        FORWARD: forward,
        INPUT_GRADIENT: input_gradient,
        TRAINING: training,
        SHARED: shared,
        DOUBLE_BACKWARD: double_backward,
    }[kind]


def _in_mode(
    work: Callable[[Tensor, Tensor], Any],
    model: nn.Module,
    kind: str,
    mode: str,
    batches: Sequence[BenchBatch],
) -> list[Callable[[], Any]]:
    """One call per batch: eager or compiled, either replayed as a CUDA graph or not."""
    run = work
    learns = kind not in (FORWARD, INPUT_GRADIENT)
    as_written = mode in ("eager", CAPTURED_EAGER)
    if not as_written:
        run = torch.compile(work, fullgraph=True, dynamic=False)

    def on(batch: BenchBatch) -> Callable[[], Any]:
        def call() -> Any:
            frozen: AbstractContextManager[None]
            frozen = nullcontext() if learns else guard.frozen_parameters(model.parameters())
            as_in_a_step = as_written and kind == DOUBLE_BACKWARD
            norms = cheap_double_backward(batch.x.device) if as_in_a_step else nullcontext()
            with frozen, norms, torch._dynamo.config.patch(trace_autograd_ops=True):
                return run(batch.x, batch.y)

        return captured(call) if mode in ("captured", CAPTURED_EAGER) else call

    return [on(batch) for batch in batches]
