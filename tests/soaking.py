"""Many steps of a recipe, and what of the process has grown with them."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

import torch
from every_recipe import EPOCHS, call, step_of
from tiny_run import Counting
from tiny_staged import staged_model
from torch import Tensor

from fastadv.algorithms.recipes.table import METHODS
from fastadv.engine.process import memory

MB = 2**20


@dataclass(frozen=True)
class Taken:
    """What the process holds: bytes resident, open files, tensors and Python objects alive, and
    graphs compiled so far."""

    resident: int
    files: int
    tensors: int
    objects: int
    compiled: int


@dataclass(frozen=True)
class Grown:
    """How much more a recipe held after its last step than when it was warm."""

    recipe: str
    mode: str
    steps: int
    resident_mb: float
    files: int
    tensors: int
    objects: int
    compiled: int

    def is_flat(self) -> bool:
        """True if nothing grew with the steps. Allocators round, so memory may drift by 8 MB."""
        counted = self.files, self.tensors, self.compiled
        return not any(each > 0 for each in counted) and self.objects < 100 and self.resident_mb < 8


def stateful() -> list[str]:
    """The recipes with state that a checkpoint holds."""
    return [name for name in METHODS if _has_state(name)]


def _has_state(method: str) -> bool:
    step = step_of(method, staged_model())
    call(step, 0)
    return bool(step.state)


def soak(method: str, steps: int, mode: str = "eager") -> Grown:
    """What grew in ``steps`` updates of ``method`` on a tiny network, after a quarter as many;
    every warm-up and every ramp ends within these."""
    counting = Counting("eager")
    warm = max(steps // 4, 8)
    step = step_of(
        method, staged_model(), mode, epoch_length=max(warm // EPOCHS, 1), backend=counting
    )
    for update in range(warm):
        call(step, update)
    before = _taken(counting)
    for update in range(warm, warm + steps):
        call(step, update % 997)
    after = _taken(counting)
    step.check()
    return Grown(
        method,
        mode,
        steps,
        round((after.resident - before.resident) / MB, 2),
        after.files - before.files,
        after.tensors - before.tensors,
        after.objects - before.objects,
        after.compiled - before.compiled,
    )


def _taken(counting: Counting) -> Taken:
    gc.collect()
    alive = gc.get_objects()
    # `type`: an object of another library may do anything when it is asked for its class.
    tensors = sum(1 for each in alive if issubclass(type(each), Tensor))
    found = Taken(
        memory.resident() or 0,
        len(os.listdir("/proc/self/fd")),
        tensors,
        len(alive),
        counting.count,
    )
    del alive
    torch._dynamo.utils.counters.clear()
    return found
