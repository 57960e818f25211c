"""A copy of weights and optimizer state, from which they are restored bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastadv.engine.model.buffers import copy_into
from fastadv.engine.packing import FlatViews

_CONTAINERS = (list, tuple, dict)


class Copies:
    """Copies of tensors, in memory that is reused as long as the tensors are the same."""

    def __init__(self) -> None:
        self._flat = FlatViews()
        self._groups: list[_Group] | None = None  # None: not allocated, perhaps for lack of memory

    @torch.no_grad()
    def take(self, tensors: list[Tensor]) -> None:
        """Copy the values of ``tensors``."""
        if self._flat.follow(tensors):
            self._groups = None
        if self._groups is None:
            self._groups = [_Group(views) for views in _alike(self._flat.views)]
        for group in self._groups:
            group.take()

    def __getstate__(self) -> dict[str, Any]:
        return vars(Copies())  # a copy of this object works on other tensors

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore the copied values, in place."""
        for group in self._groups or ():
            copy_into(group.views, group.copies)


class _Group:
    """Tensors of one device and data type, and their copies."""

    def __init__(self, views: list[Tensor]) -> None:
        self.views = views
        # Joined on a CPU, where a call per tensor costs more than the copy of a small one.
        joined = views[0].device.type == "cpu" and all(view.dim() == 1 for view in views)
        self._all = torch.cat(views) if joined else None
        if self._all is None:
            self.copies = [torch.empty_like(view) for view in views]
        else:
            self.copies = list(self._all.split([len(view) for view in views]))

    def take(self) -> None:
        if self._all is None:
            copy_into(self.copies, self.views)
        else:
            torch.cat(self.views, out=self._all)


def _alike(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """``tensors`` grouped by device (some optimizers count their steps on the host), by data type,
    and on a CPU into flat ones and others, since only the first are joined."""
    groups: dict[object, list[Tensor]] = {}
    for tensor in tensors:
        kind = tensor.device, tensor.dtype, tensor.device.type != "cpu" or tensor.dim() == 1
        groups.setdefault(kind, []).append(tensor)
    return list(groups.values())


def copies_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """A copy of each tensor, in one launch for those of one data type on a GPU."""
    if len(tensors) < 2 or tensors[0].device.type == "cpu":
        return [tensor.clone() for tensor in tensors]
    copies = [torch.empty_like(tensor) for tensor in tensors]
    for kind in dict.fromkeys((tensor.device, tensor.dtype) for tensor in tensors):
        places = [i for i, each in enumerate(tensors) if (each.device, each.dtype) == kind]
        copy_into([copies[i] for i in places], [tensors[i] for i in places])
    return copies


def copy_each(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """``copy_into``, with one call per device."""
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        there = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        copy_into([tensors[place] for place in there], [values[place] for place in there])


def _tensors_in(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among ``values``, then those inside of lists, tuples and dictionaries."""
    tensors: list[Tensor] = []
    nested: list[Any] = []
    for each in values:
        if isinstance(each, Tensor):
            tensors.append(each)
        elif isinstance(each, _CONTAINERS):
            nested.append(each)
    if nested:
        tensors += [each for each in tree_leaves(nested) if isinstance(each, Tensor)]
    return tensors


def _same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))


class OptimizerCopy:
    """A copy of what a step of ``optimizer`` may change: its weights, its state and the settings of
    its groups."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._copies = Copies()
        self._state: dict[Any, dict[str, Any]] = {}
        self._settings: list[dict[str, Any]] = []
        self._held: list[Any] = []  # keys and values of the optimizer's state
        self._of_state: list[Tensor] | None = []  # its tensors; None if a value can change inside
        self._places: list[Tensor] = []
        self._weights: list[Tensor] = []  # those of the places, each once

    def take(self, more: Sequence[Tensor] = ()) -> None:
        """Copy the present values, and those of the tensors ``more``."""
        own = self.optimizer
        self._settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in own.param_groups
        ]
        places = [p for group in own.param_groups for p in group["params"]]
        places += more
        if not _same(places, self._places):
            self._weights = list({id(p): p for p in places}.values())
            self._places = places
        settings = _tensors_in(chain.from_iterable(map(dict.values, self._settings)))
        self._copies.take([*self._weights, *self._state_tensors(), *settings])

    def _state_tensors(self) -> list[Tensor]:
        """The tensors in the optimizer's state, of which a copy without values is kept; made again
        only if an entry has changed."""
        state = self.optimizer.state
        held = [
            *(*state, *chain.from_iterable(state.values())),
            *chain.from_iterable(map(dict.values, state.values())),
        ]
        if self._of_state is not None and _same(held, self._held):
            return self._of_state
        self._held = held
        self._state = {weight: dict(values) for weight, values in state.items()}
        values = [each for one in self._state.values() for each in one.values()]
        tensors = _tensors_in(values)
        nested = any(isinstance(each, _CONTAINERS) for each in values)
        self._of_state = None if nested else tensors
        return tensors

    def __getstate__(self) -> dict[str, Any]:
        # A copy of this object works on other tensors.
        return vars(OptimizerCopy(self.optimizer))

    def put_back(self) -> None:
        """Restore everything, tensors in place."""
        own = self.optimizer
        for weight in list(own.state):
            if weight not in self._state:
                del own.state[weight]
        for weight, state in self._state.items():
            own.state[weight].clear()
            own.state[weight].update(state)
        for group, settings in zip(own.param_groups, self._settings, strict=False):
            group.update(settings)
        self._copies.put_back()
