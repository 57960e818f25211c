"""Where a step's time goes: a trace, the heaviest operations, and the idle share of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from fastadv.benchmark.clock import seconds

TOP = 10


def heaviest(
    turn: Callable[[], Any], device: torch.device, trace: Path | None
) -> list[tuple[str, float, float]]:
    """The ten operations with the largest own time: name, seconds, share of all.

    ``turn`` is run once under the profiler; the chrome trace goes to ``trace``.
    """
    profiler, _ = profiled(turn, device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(trace))
    on_gpu = device.type == "cuda"
    own = {
        event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        for event in profiler.key_averages()
    }
    total = sum(own.values()) or 1.0
    ranked = sorted(own.items(), key=lambda entry: entry[1], reverse=True)[:TOP]
    return [(name, taken, taken / total) for name, taken in ranked]


def idle_share(turn: Callable[[], Any], device: torch.device) -> float:
    """Share of a step's wall-clock time in which a CUDA device has nothing to do."""
    profiler, taken = profiled(turn, device)
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]
    return max(0.0, 1 - covered(spans) / 1e6 / taken)


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def profiled(turn: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """The profiler after one call of ``turn``, and the call's seconds."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        taken = seconds(turn, device)
    return profiler, taken
