"""Finds the BatchNorms of a model that are candidates for folding, in one forward pass."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.engine.model.bn_fold import (
    CONVOLUTIONS,
    FORWARDS,
    NORMS,
    Fold,
    forwards_replaced,
    is_plain,
)
from fastadv.engine.model.bn_stand_in import StandIn


def seen_folds(
    model: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[Tensor, list[Fold]]:
    """``forward(x)``, which calls ``model`` in eval mode, and the folds that are candidates: every
    BatchNorm whose input was the untouched output of a convolution, both called once."""
    convolutions = [module for module in model.modules() if is_plain(module, CONVOLUTIONS)]
    norms = [module for module in model.modules() if is_plain(module, NORMS)]
    took: dict[nn.Module, nn.Module] = {}
    calls: Counter[nn.Module] = Counter()
    read: set[nn.Module] = set()
    given: list[tuple[nn.Module, weakref.ref[StandIn]]] = []

    def convolve(module: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            calls[module] += 1
            output = FORWARDS[type(module)](module, x)
            if torch.compiler.is_compiling() or type(output) is not Tensor:
                return output
            stand_in = StandIn.of(output, module, lambda: output, lambda: read.add(module))
            given.append((module, weakref.ref(stand_in)))
            return stand_in

        return run

    def normalize(module: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            calls[module] += 1
            if type(x) is StandIn and x._output is not None:
                took[x._norm], x = module, x._output
            found: Tensor = FORWARDS[type(module)](module, x)
            return found

        return run

    runs = {module: convolve(module) for module in convolutions}
    runs |= {module: normalize(module) for module in norms}
    with forwards_replaced(runs), torch.enable_grad(), _Writes() as writes:
        logits = forward(x.detach().requires_grad_())
    read |= {module for module, stand_in in given if stand_in() is not None}
    folds = [Fold(convolution, norm) for convolution, norm in took.items()]
    found = [
        fold
        for fold in folds
        if calls[fold.convolution] == calls[fold.norm] == 1
        if fold.convolution not in read and fold.possible()
        if not writes.found & {_memory(tensor) for tensor in fold.tensors() if tensor is not None}
    ]
    return logits.detach(), found


class _Writes(TorchDispatchMode):
    """Records the storages to which operations write. A forward that computes its weights in place
    may do so through ``.data``, which does not change a tensor's version."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[place] if place < len(args) else kwargs.get(argument.name)
                each = given if isinstance(given, (list, tuple)) else [given]
                self.found |= {_memory(value) for value in each if type(value) is not StandIn}
        return func(*args, **kwargs)


def _memory(value: Any) -> int:
    return value.untyped_storage().data_ptr() if isinstance(value, Tensor) else 0
