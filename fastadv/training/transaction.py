"""A call of a step takes effect completely or not at all.

If a call raises (out of memory, Ctrl-C, an error of the optimizer), weights, buffers, optimizer and
the state of the parts are bit for bit as before the call. The same holds after an update that must
not count, if Python may read the fault flag; on a GPU each update masks itself instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastadv.algorithms.contract import Part, Renews
from fastadv.algorithms.plan import Plan
from fastadv.engine.model.buffers import Snapshot
from fastadv.engine.model.network import Network
from fastadv.engine.optimizer.optimizer_copy import (
    Copies,
    OptimizerCopy,
    copies_of,
    copy_each,
)
from fastadv.engine.optimizer.updater import Updater
from fastadv.engine.process import distributed

_PLAIN = (bool, int, float, str, type(None))


class Undoable(Protocol):
    """The attributes of a step that a transaction uses."""

    plan: Plan
    net: Network
    updater: Updater
    offset: Tensor

    @property
    def epoch(self) -> float: ...

    def moment(self) -> tuple[Any, ...]: ...

    def return_to(self, moment: tuple[Any, ...]) -> None: ...


class Transaction:
    """Copies what a call of ``step`` may change; every call runs inside ``around``."""

    def __init__(self, step: Undoable) -> None:
        self._step = step
        self._optimizer = OptimizerCopy(step.updater.optimizer)
        self._numbers = Copies()

    @contextmanager
    def around(self, index: Tensor | None) -> Iterator[Snapshot]:
        """Restore everything if the call inside raises or its update must not count. Yields the
        values of the model's buffers before the call.

        ``index`` (B,) are the rows of per-sample state that the call writes; None if there is no
        such state.
        """
        step = self._step
        self._optimizer.take([*step.net.structure.parameters.values()])
        buffers = Snapshot(step.net.kept_buffers)
        gradients = _Gradients(step)
        # With several processes each one also writes the rows of the others' batches.
        rows = index if distributed.sharing() == 1 else None
        epoch = step.epoch
        parts = [_PartCopy(part, rows, epoch) for part in step.plan.parts.values()]
        before = _Clock(step, self._numbers)

        def put_back() -> None:
            self._optimizer.put_back()
            buffers.put_back()
            for part in parts:
                part.put_back()
            step.net.copies.invalidate()

        try:
            yield buffers
            counts = not step.net.syncs_are_free or step.updater.faults.healthy()
        except BaseException:
            put_back()
            gradients.put_back()
            before.put_back()
            raise
        if not counts:
            put_back()


class _Gradients:
    """``.grad`` of every parameter; values are copied if accumulated gradients wait for an
    update."""

    def __init__(self, step: Undoable) -> None:
        waits = step.updater.waits
        parameters = step.net.structure.parameters.values()
        self._found = [(parameter, parameter.grad) for parameter in parameters]
        self._values = [
            None if gradient is None or not waits else gradient.clone()
            for _, gradient in self._found
        ]

    @torch.no_grad()
    def put_back(self) -> None:
        for (parameter, gradient), value in zip(self._found, self._values, strict=True):
            parameter.grad = gradient
            if gradient is not None and value is not None:
                gradient.copy_(value)


class _PartCopy:
    """A copy of a part's state. Only the rows of this batch are copied of per-sample tensors,
    unless the call overwrites all rows."""

    @torch.no_grad()
    def __init__(self, part: Part, index: Tensor | None, epoch: float) -> None:
        self._part = part
        self._state = dict(part.state)
        self._index = index
        renewed = bool(part.state) and isinstance(part, Renews) and part.renews(epoch)
        partial = index is not None and not renewed
        self._rows = part.sample_state() if partial else ()
        self._copies: dict[str, Tensor] = {}
        if part.state:
            whole = {name: tensor for name, tensor in part.state.items() if name not in self._rows}
            self._copies.update(zip(whole, copies_of(list(whole.values())), strict=True))
            rows = {name: part.state[name][index] for name in self._rows if name in part.state}
            self._copies.update(rows)
        own = vars(part).items()
        self._plain = {name: value for name, value in own if isinstance(value, _PLAIN)}

    @torch.no_grad()
    def put_back(self) -> None:
        whole = [name for name in self._state if name not in self._rows]
        copy_each([self._state[name] for name in whole], [self._copies[name] for name in whole])
        for name in self._rows:
            if name in self._state and self._index is not None:
                self._state[name][self._index] = self._copies[name]
        self._part.state.clear()
        self._part.state.update(self._state)
        vars(self._part).update(self._plain)


class _Clock:
    """The position of the step in its run, and the state of the updater, the fault flag and the
    random generator."""

    def __init__(self, step: Undoable, numbers: Copies) -> None:
        self._step, self._numbers = step, numbers
        self._own = step.moment()
        updater = step.updater
        self._updater = updater.moment()
        faults = updater.faults
        numbers.take([step.offset, faults.bad_step, faults.kind, updater.skipped])
        self._generator = torch.get_rng_state()

    def put_back(self) -> None:
        step = self._step
        step.return_to(self._own)
        step.updater.return_to(self._updater)
        self._numbers.put_back()
        torch.set_rng_state(self._generator)
