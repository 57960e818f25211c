"""A step kernel by kernel: count, time, bytes, and the share of a copy's rate."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastadv.benchmark.arithmetic import Spread
from fastadv.benchmark.clock import seconds
from fastadv.benchmark.launches import Launches
from fastadv.benchmark.profiling import covered, profiled
from fastadv.benchmark.rows import Row

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
REPLAYS = 5  # untimed by the profiler, for the wall clock


@dataclass(frozen=True)
class Activity:
    """Something a GPU did: from ``began`` for ``us`` microseconds. ``copied`` are the bytes of a
    memory copy or fill, read and written; None for kernels."""

    name: str
    began: float
    us: float
    copied: int | None = None


def kernel_table(
    call: Callable[[], Any],
    device: torch.device,
    launches: Launches,
    copy_rate: float,
    about: Mapping[str, Any],
) -> list[Row]:
    """Rows of one ``call`` on a CUDA device, most such as the replay of a captured step.

    ``launches`` are those that were recorded into its graphs (``watched_launches`` around its
    building), ``copy_rate`` is in bytes per second, ``about`` is added to every row. The first row
    is of kind "kernels" and is the total; then one of kind "kernel" per name, the longest first.
    """
    wall = Spread.of([seconds(call, device) for _ in range(REPLAYS)]).median
    profiled(call, device)  # the first profile of a process also starts the profiler
    profiler, _ = profiled(call, device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    return table_rows(activities(events), launches, copy_rate, wall, about)


def activities(events: Iterable[Mapping[str, Any]]) -> list[Activity]:
    """The device's activities in a chrome trace."""
    found = []
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in ON_DEVICE:
            name, copied = str(event["name"]), event.get("args", {}).get("bytes")
            if event["cat"] == "kernel":
                copied = None
            elif copied is not None and "DtoD" in name:
                copied *= 2  # read and written here; other copies have one end elsewhere
            found.append(Activity(name, float(event["ts"]), float(event["dur"]), copied))
    return found


def table_rows(
    found: Sequence[Activity],
    launches: Launches,
    copy_rate: float,
    wall_seconds: float,
    about: Mapping[str, Any],
) -> list[Row]:
    """The rows of ``kernel_table`` from the device's activities in one call.

    ``bytes`` are null where they are unknown: for kernels of cuDNN, cuBLAS and PyTorch.
    """
    by_name: dict[str, list[Activity]] = {}
    for activity in found:
        by_name.setdefault(activity.name, []).append(activity)
    rows = [
        dict(about) | _kernel_row(name, entries, launches.get(name, []), copy_rate)
        for name, entries in by_name.items()
    ]
    rows.sort(key=lambda row: -row["us"])
    return [dict(about) | _whole(found, wall_seconds, rows), *rows]


def _whole(found: Sequence[Activity], wall_seconds: float, rows: Sequence[Row]) -> Row:
    spans = [(entry.began, entry.began + entry.us) for entry in found]
    span = max(end for _, end in spans) - min(began for began, _ in spans) if spans else 0.0
    return {
        "kind": "kernels",
        "count": len(found),
        "wall_us": round(1e6 * wall_seconds, 1),
        "kernel_us": round(sum(entry.us for entry in found), 1),
        # From the first kernel's begin to the last one's end, under the profiler.
        "span_us": round(span, 1),
        "idle_share": round(1 - covered(spans) / span, 4) if span else None,
        "us_of_known_bytes": round(sum(row["us"] for row in rows if row["bytes"] is not None), 1),
    }


def _kernel_row(
    name: str, entries: Sequence[Activity], launched: Sequence[int], copy_rate: float
) -> Row:
    us = sum(entry.us for entry in entries)
    moved = _moved(entries, launched)
    known = moved is not None and us > 0
    return {
        "kind": "kernel",
        "name": name,
        "count": len(entries),
        "us": round(us, 2),
        "bytes": moved,
        "of_copy": round(moved / (us * 1e-6) / copy_rate, 4) if known and moved else None,
    }


def _moved(entries: Sequence[Activity], launched: Sequence[int]) -> int | None:
    """The bytes of all ``entries`` of one name."""
    copied = [entry.copied for entry in entries if entry.copied is not None]
    if copied:
        return sum(copied) if len(copied) == len(entries) else None
    if not launched:
        return None
    if len(set(launched)) == 1:
        return launched[0] * len(entries)
    # With several sizes, only if every recorded launch was executed.
    return sum(launched) if len(launched) == len(entries) else None
