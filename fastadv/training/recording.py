"""One recording of an update: static inputs, outputs, replays, and the tensors they work on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastadv.algorithms.contract import Batch, Part
from fastadv.engine.optimizer.replayed import ReplayedUpdate
from fastadv.threat import Threat
from fastadv.threat import batch as threats
from fastadv.training.results import PassResults


class Recording:
    """One recording: static inputs, outputs, the replays, and the tensors they work on."""

    def __init__(
        self,
        static: Batch,
        ok: Tensor,
        results: PassResults,
        replay_passes: Callable[[], None],
        replay_finish: Callable[[], None],
        used: list[Tensor],
    ) -> None:
        self.static, self.ok, self.results = static, ok, results
        self.replay_passes, self.replay_finish = replay_passes, replay_finish
        # A part may replace its scratch tensors for another situation; the graph writes to these.
        self.used = used
        self.update: ReplayedUpdate | None = None  # set when the optimizer first steps for it

    def fill(self, batch: Batch) -> None:
        """Copy ``batch`` into the static inputs; the noise offset is always the same tensor."""
        every = zip(batch_tensors(self.static), batch_tensors(batch), strict=True)
        pairs = [(own, new) for own, new in every if own is not new]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [new for _, new in pairs])


def batch_tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch, including those of its view and its threat."""
    found: list[Tensor] = []
    for value in batch:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, Threat):
            found += threats.tensors(value)
        elif value is not None:
            found += list(value)
    return found


def copied(batch: Batch) -> Batch:
    """A copy of the batch with the same offset tensor."""
    own: dict[str, Any] = {
        name: value.clone()
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor) and name != "offset"
    }
    if batch.view is not None:
        own["view"] = type(batch.view)(*(tensor.clone() for tensor in batch.view))
    return batch._replace(**own, threat=threats.copied(batch.threat))


def held_tensors(value: Any, seen: set[int]) -> Iterator[Tensor]:
    """The tensors reachable from ``value`` through containers, parts, and objects of this package,
    without modules."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, (list, tuple)):
        inside = list(value)
    elif isinstance(value, Part) or _is_of_this_package(value):
        inside = list(getattr(value, "__dict__", {}).values())
    else:
        return
    for each in inside:
        yield from held_tensors(each, seen)


def _is_of_this_package(value: Any) -> bool:
    return type(value).__module__.startswith("fastadv.") and not isinstance(value, nn.Module)
