"""Replay the passes of an update as CUDA graphs.

Two graphs an update: everything before the optimizer, and everything after it. Between them the
user's optimizer steps as it always does, so any optimizer works; its few launches hide behind the
first graph, which is still running. What a graph reads that changes from step to step lives in
tensors filled in place: the batch is copied into static inputs, schedules and the noise offset
are 0-dim tensors anyway.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastadv.engine.buffers import copy_into

if TYPE_CHECKING:
    from fastadv.contract import Batch
    from fastadv.walk import Found, Walk

KEPT = 4  # recordings: two batch shapes in each of two phases
WARM_UPS = 2


class CudaRecorder:
    """Records functions into CUDA graphs that share one memory pool."""

    def __init__(self) -> None:
        self.pool: Any = None

    def warm_up(self, function: Callable[[], Any]) -> None:
        """Run on a side stream, as recording will: libraries initialise, kernels compile."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)

    def __call__(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            result = function()
        self.pool = graph.pool()
        return result, graph.replay


class Captured:
    """A walk whose two halves are recorded once for each situation and then replayed.

    A situation is everything a recording has frozen: batch shapes, which parts are active, where
    parameters and buffers lie, train flags and precisions. A new one is recorded; the oldest of
    ``KEPT`` is forgotten. Warming up leaves no trace: every tensor the walk changes is put back.
    """

    def __init__(self, walk: Walk, recorder: Any = None) -> None:
        self.walk = walk
        self.recorder = recorder or CudaRecorder()
        self.recorded = 0  # how many times something was recorded, for tests and profiles
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._current: _Entry | None = None

    def gather(self, batch: Batch) -> Found:
        """``Walk.gather``, replayed; the tensors returned are the recording's own."""
        key = self._situation(batch)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._record(batch)
            self._entries[key] = entry
            while len(self._entries) > KEPT:
                self._entries.popitem(last=False)
        self._entries.move_to_end(key)
        self._current = entry
        entry.fill(batch)
        entry.replay_gather()
        return entry.found

    def settle(self, found: Found, ok: Tensor, update: bool) -> None:
        """``Walk.settle``, replayed."""
        entry = self._current
        if entry is None or found is not entry.found:
            raise RuntimeError("settle must follow the gather it belongs to")
        if not update:
            self.walk.settle(found, ok, update)
            return
        entry.ok.copy_(ok)
        entry.replay_settle()

    def _situation(self, batch: Batch) -> Hashable:
        net = self.walk.net
        return (
            tuple((t.shape, t.dtype, t.stride()) for t in _tensors(batch)),
            tuple(value is None for value in batch),
            tuple(part.active for part in self.walk.plan.parts.values()),
            tuple((p.data_ptr(), p.requires_grad) for p in net.model.parameters()),
            tuple(buffer.data_ptr() for buffer in net.buffers),
            tuple(module.training for module in net.model.modules()),
            (net.outer_dtype, net.attack_dtype),
        )

    def _record(self, batch: Batch) -> _Entry:
        static = _copied(batch)
        ok = torch.ones((), dtype=torch.bool, device=self.walk.net.device)
        before = [tensor.clone() for tensor in self._changing()]

        def both() -> None:
            self.walk.settle(self.walk.gather(static), ok, True)

        for _ in range(WARM_UPS):
            self.recorder.warm_up(both)
        # Parts may have allocated scratch while warming up; what they keep is still the same set.
        copy_into(self._changing(), before)
        found, replay_gather = self.recorder(lambda: self.walk.gather(static))
        _, replay_settle = self.recorder(lambda: self.walk.settle(found, ok, True))
        copy_into(self._changing(), before)
        self.recorded += 1
        return _Entry(static, ok, found, replay_gather, replay_settle)

    def _changing(self) -> list[Tensor]:
        """Every tensor on the device that a walk changes."""
        net, plan = self.walk.net, self.walk.plan
        found = [*net.model.parameters(), *net.model.buffers()]
        for part in plan.parts.values():
            found += [tensor for tensor in part.state.values() if tensor.device == net.device]
        return [tensor.detach() for tensor in found]


class _Entry:
    """One recording: static inputs, outputs, and the two replays."""

    def __init__(
        self,
        static: Batch,
        ok: Tensor,
        found: Found,
        replay_gather: Callable[[], None],
        replay_settle: Callable[[], None],
    ) -> None:
        self.static, self.ok, self.found = static, ok, found
        self.replay_gather, self.replay_settle = replay_gather, replay_settle

    def fill(self, batch: Batch) -> None:
        """Copy ``batch`` into the static inputs; the noise offset is the same tensor always."""
        every = zip(_tensors(self.static), _tensors(batch), strict=True)
        pairs = [(own, new) for own, new in every if own is not new]
        if pairs:
            torch._foreach_copy_([own for own, _ in pairs], [new for _, new in pairs])


def _tensors(batch: Batch) -> list[Tensor]:
    """All tensors of a batch, the view's included."""
    found: list[Tensor] = []
    for value in batch:
        if isinstance(value, Tensor):
            found.append(value)
        elif value is not None:
            found += list(value)
    return found


def _copied(batch: Batch) -> Batch:
    """The batch with tensors of its own, all but the offset."""
    own: dict[str, Any] = {
        name: value.clone()
        for name, value in batch._asdict().items()
        if isinstance(value, Tensor) and name != "offset"
    }
    if batch.view is not None:
        own["view"] = type(batch.view)(*(tensor.clone() for tensor in batch.view))
    return batch._replace(**own)
