"""Time candidates turn by turn in one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastadv.benchmark.clock import seconds
from fastadv.benchmark.memory import PeakMemory

LEAST_TURNS = 3  # fewer give no spread


@dataclass
class Candidate:
    """Something to time. ``turn`` runs it a few times and returns the seconds per run.

    ``warm_seconds`` are those of the untimed calls before the first turn, including compilation.
    ``facts`` are added to its row. ``once`` runs it a single time, for a profile; None if it runs
    in another process.
    """

    name: str
    turn: Callable[[], float]
    warm_seconds: Sequence[float] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    peak_bytes: int | None = None
    close: Callable[[], None] = lambda: None
    once: Callable[[], Any] | None = None

    @property
    def is_our_step(self) -> bool:
        """True if this is a whole training step of fastadv."""
        return self.facts["by"] == "fastadv" and self.is_step

    @property
    def is_step(self) -> bool:
        """True if this is a whole training step, ours or a peer's: no pass and no operator."""
        return not {"pass", "operator"} & self.facts.keys()

    def compile_seconds(self, steady: float) -> float:
        """The warm-up time minus the time of as many steady steps."""
        return max(0.0, sum(self.warm_seconds) - steady * len(self.warm_seconds))


def warmed(
    call: Callable[[], Any], device: torch.device, memory: PeakMemory, calls: int
) -> list[float]:
    """Seconds of the untimed first ``calls``; peak memory is counted from the last of them."""
    found = [seconds(call, device) for _ in range(calls - 1)]
    memory.forget()
    return [*found, seconds(call, device)]


def interleave(
    candidates: Sequence[Candidate],
    repeats: int,
    progress: Callable[[int], None] = lambda turn: None,
    until: float | None = None,
    after: Callable[[Mapping[str, Sequence[float]]], None] = lambda found: None,
    found: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every candidate in each of ``repeats`` turns.

    Every second turn has the reverse order, so that no candidate always runs after the same one and
    a slow drift of the machine affects all alike. After ``until`` (of ``time.monotonic``) no turn
    begins once there are three. ``after`` receives the results after each turn. ``found`` is filled
    with the results as they come, for a caller who wants them after an interruption.
    """
    found = {} if found is None else found
    found.update((candidate.name, []) for candidate in candidates)
    if len(found) < len(candidates):
        raise ValueError("two candidates have the same name")
    for turn in range(repeats):
        if until is not None and turn >= LEAST_TURNS and time.monotonic() > until:
            break
        progress(turn)
        order = candidates if turn % 2 == 0 else list(reversed(candidates))
        for candidate in order:
            found[candidate.name].append(candidate.turn())
        after(found)
    return found
