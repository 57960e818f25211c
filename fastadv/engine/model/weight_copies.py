"""What stands in the model during the passes of an update, made once for each state of the weights.

Low precision: autocast would cast every weight again in every pass, eleven times the same for
PGD-10; its own cache outlives a change of the weights in place (``precision.py``), so the copies
are made here. With running statistics BatchNorm folds into the convolution before it (``folding``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadv.engine.model.bn_folding import CONVOLUTIONS, Fold, Folding
from fastadv.engine.model.buffers import copy_into

# Modules that hand weight and bias to an operation autocast lowers. Not their subclasses, which
# may do something to a weight first (standardise it) that needs its full precision. Code outside of
# such a module that reads its weight sees the copy.
LOWERED = (*CONVOLUTIONS, nn.Linear)


class Copy(NamedTuple):
    """Two Parameters over one storage: one frozen for attack passes, one trainable for the outer
    pass."""

    frozen: nn.Parameter
    learning: nn.Parameter

    @classmethod
    def like(cls, tensor: Tensor, dtype: torch.dtype) -> Copy:
        """Uninitialised memory of the shape of ``tensor``."""
        frozen = nn.Parameter(torch.empty_like(tensor, dtype=dtype), requires_grad=False)
        return cls(frozen, nn.Parameter(frozen.detach()))

    def fits(self, tensor: Tensor, dtype: torch.dtype) -> bool:
        """True if it still has the tensor's shape and device, and this data type."""
        own = self.frozen
        return (own.shape, own.device, own.dtype) == (tensor.shape, tensor.device, dtype)


class Place(NamedTuple):
    """Where a parameter hangs: ``module._parameters[name]``."""

    module: nn.Module
    name: str


class WeightCopies:
    """``folds`` are used where BatchNorm uses its running statistics.

    Call ``invalidate`` after every in-place change of the weights: until then the copies serve
    every pass.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.folding = Folding()
        self.learning: dict[str, nn.Parameter] = {}  # by the name of what each stands for
        self._copies: dict[torch.dtype | None, list[Copy]] = {}
        self._up_to_date: dict[torch.dtype | None, dict[Place, Copy]] = {}

    @property
    def folds(self) -> list[Fold]:
        """The folds in use; those that turn out to be wrong leave it."""
        return self.folding.folds

    @folds.setter
    def folds(self, folds: list[Fold]) -> None:
        self.folding.folds = folds
        self.invalidate()

    def __getstate__(self) -> dict[str, Any]:
        # The two parameters of a ``Copy`` share their memory, which those of a copy would not.
        return vars(self) | {"_copies": {}, "_up_to_date": {}}

    def invalidate(self) -> None:
        """Mark all copies stale. Call after every in-place weight change."""
        self._up_to_date.clear()
        self.folding.invalidate()

    @contextmanager
    def installed(
        self,
        dtype: torch.dtype | None,
        *,
        folded: bool = False,
        learn: Mapping[str, nn.Parameter] | None = None,
    ) -> Iterator[None]:
        """Copies of the weights stand in the model inside: in ``dtype`` those autocast would cast
        (None: none), and with ``folded`` BatchNorms are computed in their convolutions.

        ``learn`` are the model's parameters by name where a copy is to require grad as its weight
        does; ``learning`` names those.
        """
        if dtype is None and not folded:
            try:
                yield
            finally:
                self.folding.invalidate()  # a training pass moves the BatchNorms' statistics
            return
        with torch.no_grad():
            used = self.folding.refreshed(dtype) if folded else []
            copies = self._refreshed(dtype)
        own = {place: place.module._parameters[place.name] for place in copies}
        names = {id(weight): name for name, weight in (learn or {}).items()}
        try:
            for place, weight in own.items():
                copy = copies[place]
                learns = weight is not None and id(weight) in names and weight.requires_grad
                if learns:
                    self.learning[names[id(weight)]] = copy.learning
                place.module._parameters[place.name] = copy.learning if learns else copy.frozen
            with self.folding.at_work(used):
                yield
        finally:
            self.learning = {}
            for place, weight in own.items():
                place.module._parameters[place.name] = weight
            if not folded:
                self.folding.invalidate()  # a training pass moves the BatchNorms' statistics

    def _refreshed(self, dtype: torch.dtype | None) -> dict[Place, Copy]:
        """A copy for each place, with the values of this moment.

        They are the same tensors every time, unless the model has changed; a weight that hangs in
        two places has one copy.
        """
        if dtype not in self._up_to_date:
            values = self._values(dtype)
            tensors = list({id(tensor): tensor for tensor in values.values()}.values())
            low = [t.dtype if dtype is None or t.dtype != torch.float32 else dtype for t in tensors]
            copies = self._copies.get(dtype, [])
            fit = [copy.fits(t, to) for copy, t, to in zip(copies, tensors, low, strict=False)]
            if len(copies) != len(tensors) or not all(fit):
                copies = [Copy.like(tensor, to) for tensor, to in zip(tensors, low, strict=True)]
                self._copies[dtype] = copies
            copy_into([copy.frozen for copy in copies], tensors)
            of = {id(tensor): copy for tensor, copy in zip(tensors, copies, strict=True)}
            self._up_to_date[dtype] = {place: of[id(values[place])] for place in values}
        return self._up_to_date[dtype]

    def _values(self, dtype: torch.dtype | None) -> dict[Place, Tensor]:
        """What to copy, by the place where the copy will hang."""
        values: dict[Place, Tensor] = {}
        if dtype is None:
            return values
        for module in self.model.modules():
            if type(module) in LOWERED:
                for name in ("weight", "bias"):
                    parameter = module._parameters.get(name)
                    # Autocast leaves float64 as it is.
                    if parameter is not None and parameter.dtype == torch.float32:
                        values[Place(module, name)] = parameter
        return values
