"""Weights and optimizer state as they were at one moment, to be put back bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fastadv.engine.model.buffers import copy_into


class Copies:
    """Copies of tensors, in memory that is used again as long as the tensors are the same."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._where: list[object] = []
        self._groups: list[tuple[list[Tensor], list[Tensor]]] = []  # a device's, and their copies

    @torch.no_grad()
    def take(self, tensors: list[Tensor]) -> None:
        """Remember the values of ``tensors``."""
        where = [*map(Tensor.data_ptr, tensors), *map(Tensor.size, tensors)]
        if where != self._where or not all(map(is_, tensors, self._tensors)):
            groups = [
                (group, [torch.empty_like(tensor, requires_grad=False) for tensor in group])
                for group in _by_device(tensors)
            ]
            self._tensors, self._where, self._groups = tensors, where, groups
        for group, copies in self._groups:
            copy_into(copies, group)

    @torch.no_grad()
    def put_back(self) -> None:
        """The tensors hold again what they held."""
        for group, copies in self._groups:
            copy_into(group, copies)


def _by_device(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Some optimizers count their steps on the host."""
    devices = dict.fromkeys(tensor.device for tensor in tensors)
    return [[tensor for tensor in tensors if tensor.device == device] for device in devices]


def copy_each(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """``copy_into``, a launch for each device."""
    for device in dict.fromkeys(tensor.device for tensor in tensors):
        there = [place for place, tensor in enumerate(tensors) if tensor.device == device]
        copy_into([tensors[place] for place in there], [values[place] for place in there])


class OptimizerCopy:
    """What a step of ``optimizer`` may change: its weights, its state, its groups' settings."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self._copies = Copies()
        self._state: dict[Any, dict[str, Any]] = {}
        self._settings: list[dict[str, Any]] = []

    def take(self, more: Sequence[Tensor] = ()) -> None:
        """Remember this moment, and the values of the tensors ``more``."""
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
        """Everything is again what it was, tensors in place."""
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
