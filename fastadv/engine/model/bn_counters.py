"""Counts the batches of all BatchNorms of a network in one launch.

Every BatchNorm adds one to its ``num_batches_tracked`` in every training pass. That is one launch
each, 187 in one PGD-10 update of PreActResNet-18, for a number that is not read unless ``momentum``
is None.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from fastadv.engine.model.bn_fold import NORMS

NAME = "num_batches_tracked"


class Counted(NamedTuple):
    """A BatchNorm and its counter while the counter is detached from the module."""

    norm: nn.Module
    counter: Tensor


class BatchNormCounters:
    """The counters of those BatchNorms that a forward pass calls once.

    The others (called twice, called only in training, or with ``momentum=None``) count by
    themselves.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._once: list[nn.Module] = []
        self._detached: list[Counted] = []

    @contextmanager
    def calibrating(self) -> Iterator[None]:
        """Find out which BatchNorms are called once in the forward pass within this context."""
        calls: Counter[nn.Module] = Counter()
        # A global hook, since a module with a hook of its own would not be folded.
        handle = register_module_forward_pre_hook(lambda module, _: calls.update([module]))
        try:
            yield
        finally:
            handle.remove()
        norms = [module for module in self.model.modules() if type(module) in NORMS]
        self._once = [norm for norm in norms if calls[norm] == 1]

    def leave(self) -> None:
        """Leave all counters in their modules, since the model reads them."""
        self._once = []

    @torch.no_grad()
    def move(self, by: int) -> None:
        """Add ``by`` to every counter of a BatchNorm that is called once."""
        for norm in self._once:
            counter = norm._buffers.get(NAME)
            if counter is not None:
                counter += by

    @property
    def any(self) -> bool:
        """True if any BatchNorm is called once."""
        return bool(self._once)

    @contextmanager
    def detached(self) -> Iterator[None]:
        """Within this context the counters are detached from their modules, and only ``count``
        changes them."""
        outer = self._detached
        found = []
        for norm in self._once:
            counter = norm._buffers.get(NAME)
            if counter is not None and norm.momentum is not None:
                found.append(Counted(norm, counter))
        try:
            for norm, _ in found:
                norm._buffers[NAME] = None
            self._detached = outer + found
            yield
        finally:
            self._detached = outer
            for norm, counter in found:
                norm._buffers[NAME] = counter

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Within this context ``count`` counts nothing."""
        counted, self._detached = self._detached, []
        try:
            yield
        finally:
            self._detached = counted

    @property
    def tensors(self) -> list[Tensor]:
        """The counters that are detached now, and so not among the model's buffers."""
        return [counter for _, counter in self._detached]

    def count(self, passes: int = 1) -> None:
        """Count ``passes`` more for every BatchNorm in training mode, in one launch."""
        counters: list[Any] = []
        for norm, counter in self._detached:
            if norm.training:
                counters.append(counter)
        if counters and passes:
            with torch.no_grad():
                torch._foreach_add_(counters, passes)
