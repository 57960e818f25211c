"""Seconds of a call, waiting for the device where it works on its own."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from fastadv.benchmark.arithmetic import Spread

# Steps between two synchronisations. Launching a replayed graph and detecting its end take a
# fraction of a millisecond; in a training loop, and in four steps, this overlaps with the previous
# step.
STEPS_PER_TURN = {"cpu": 1, "cuda": 4}
# Per sample of one operation alone. On CUDA, long enough that launching and waiting for the graph
# are negligible.
SECONDS_PER_SAMPLE = {"cpu": 0.02, "cuda": 0.002}


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call, its work on the device included."""
    synchronize(device)
    began = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - began


def seconds_per_step(step: Callable[[], Any], device: torch.device) -> float:
    """Seconds per step: ``STEPS_PER_TURN`` of them between two synchronisations."""
    steps = STEPS_PER_TURN[device.type]
    return seconds(_rounds([step], steps), device) / steps


def seconds_alone(calls: list[Callable[[], Any]], device: torch.device, repeats: int) -> Spread:
    """Seconds per call of one operation alone.

    ``calls`` do the same on different tensors and are used in turn, so that the inputs of a small
    operation are not in the cache. On CUDA they are replayed as one graph, because a launch may
    take longer than the work; on a CPU they are repeated. A sample takes about
    ``SECONDS_PER_SAMPLE`` and at most 200 rounds.
    """
    on_cuda = device.type == "cuda"
    work = captured(_rounds(calls, 1)) if on_cuda else _rounds(calls, 1)
    work()
    once = max(seconds(work, device), 1e-7)
    rounds = math.ceil(SECONDS_PER_SAMPLE[device.type] / once)
    rounds = max(1, min(200, rounds))
    work = captured(_rounds(calls, rounds)) if on_cuda else _rounds(calls, rounds)
    found = [seconds(work, device) for _ in range(repeats)]
    return Spread.of(found).times(1 / (rounds * len(calls)))


def _rounds(calls: list[Callable[[], Any]], rounds: int) -> Callable[[], None]:
    def work() -> None:
        for _ in range(rounds):
            for call in calls:
                call()

    return work


def captured(work: Callable[[], Any]) -> Callable[[], None]:
    """``work`` as the replay of one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay
