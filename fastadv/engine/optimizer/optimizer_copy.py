"""A copy of weights and optimizer state, from which they are restored bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastadv.engine.model.buffers import copy_into
from fastadv.engine.packing import FlatViews


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


def copy_each(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """``copy_into``, with one call per device."""
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        there = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        copy_into([tensors[place] for place in there], [values[place] for place in there])


class OptimizerCopy:
    """A copy of what a step of ``optimizer`` may change: its weights, its state and the settings of
    its groups."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._copies = Copies()
        self._state: dict[Any, dict[str, Any]] = {}
        self._settings: list[dict[str, Any]] = []

    def take(self, more: Sequence[Tensor] = ()) -> None:
        """Copy the present values, and those of the tensors ``more``."""
        own = self.optimizer
        weights = {id(p): p for group in own.param_groups for p in group["params"]}
        weights |= {id(tensor): tensor for tensor in more}
        self._state = {weight: dict(state) for weight, state in own.state.items()}
        self._settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in own.param_groups
        ]
        held = [*self._state.values(), *self._settings]
        values = [each for one in held for each in one.values()]
        tensors = [each for each in values if isinstance(each, Tensor)]
        nested = [each for each in values if isinstance(each, (list, tuple, dict))]
        tensors += [each for each in tree_leaves(nested) if isinstance(each, Tensor)]
        self._copies.take([*weights.values(), *tensors])

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
