"""The operators of ``fastadv.kernels`` as candidates, each alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fastadv import kernels
from fastadv.benchmark.clock import SECONDS_PER_SAMPLE, captured, seconds
from fastadv.benchmark.interleave import Candidate
from fastadv.benchmark.kernel_calls import LARGE, kernel_calls, moved
from fastadv.benchmark.setting import Setting
from fastadv.kernels.dispatch import why_not_triton

MOST_ROUNDS = 1000


def operator_candidate(setting: Setting, name: str) -> Candidate:
    """The operator ``name`` on the device of ``setting``, with the backend that a step would take.

    One turn repeats it for about ``SECONDS_PER_SAMPLE``; on CUDA as the replay of one graph, since
    a launch may take longer than the work."""
    device = torch.device(setting.device)
    arguments = moved(kernel_calls(LARGE)[name](), device)
    function = getattr(kernels, name)

    def call() -> Any:
        with torch.no_grad():
            return function(*arguments)

    warm = [seconds(call, device) for _ in range(2)]
    rounds = math.ceil(SECONDS_PER_SAMPLE[device.type] / max(seconds(call, device), 1e-7))
    rounds = max(1, min(MOST_ROUNDS, rounds))

    def work() -> None:
        for _ in range(rounds):
            call()

    run: Callable[[], None] = captured(work) if device.type == "cuda" else work
    run()
    on_triton = device.type == "cuda" and why_not_triton(device) is None
    facts = {
        "by": "fastadv",
        "operator": name,
        "backend": "triton" if on_triton else "reference",
        "size": str(LARGE),
    }
    return Candidate(
        f"kernel: {name}", lambda: seconds(run, device) / rounds, warm, facts, once=call
    )
