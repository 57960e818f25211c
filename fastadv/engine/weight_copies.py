"""What stands in the model during the passes of an update, made once for each state of the weights.

Low precision: autocast would cast every weight again in every pass, eleven times the same for
PGD-10; its own cache outlives a change of the weights in place (``precision.py``), so the copies
are made here. Running statistics: in an attack BatchNorm folds into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadv.engine.buffers import copy_into
from fastadv.engine.folding import CONVOLUTIONS, Fold

# Modules that hand weight and bias to an operation autocast lowers. Not their subclasses, which
# may do something to a weight first (standardise it) that must see all its digits. Whoever reads
# such a module's weight from outside of it sees the copy.
LOWERED = (*CONVOLUTIONS, nn.Linear)


class Kind(NamedTuple):
    """The type that weights are cast to, if any, and whether BatchNorms are folded."""

    dtype: torch.dtype | None
    folded: bool


class Copy(NamedTuple):
    """One memory, standing in passes that learn nothing and in passes that learn."""

    frozen: nn.Parameter
    learning: nn.Parameter

    @classmethod
    def like(cls, tensor: Tensor, dtype: torch.dtype) -> Copy:
        """Room for the values of ``tensor``."""
        frozen = nn.Parameter(torch.empty_like(tensor, dtype=dtype), requires_grad=False)
        return cls(frozen, nn.Parameter(frozen.detach()))

    def fits(self, tensor: Tensor, dtype: torch.dtype) -> bool:
        """Whether it still has the tensor's shape and place, and this type."""
        own = self.frozen
        return (own.shape, own.device, own.dtype) == (tensor.shape, tensor.device, dtype)


class Place(NamedTuple):
    """Where a parameter hangs: ``module._parameters[name]``."""

    module: nn.Module
    name: str


class WeightCopies:
    """``folds`` are used where BatchNorm uses its running statistics.

    Whoever changes the weights says so (``outdate``): the copies serve every pass until then.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.folds: list[Fold] = []
        self.learning: dict[str, nn.Parameter] = {}  # by the name of what each stands for
        self._copies: dict[Kind, list[Copy]] = {}
        self._up_to_date: dict[Kind, dict[Place, Copy]] = {}
        self._identity = nn.Identity()

    def __getstate__(self) -> dict[str, Any]:
        # The two parameters of a ``Copy`` share their memory, which those of a copy would not.
        return vars(self) | {"_copies": {}, "_up_to_date": {}}

    def outdate(self) -> None:
        """The weights have changed."""
        self._up_to_date.clear()

    @contextmanager
    def in_place(
        self, dtype: torch.dtype | None, *, folded: bool = False, learn: bool = False
    ) -> Iterator[None]:
        """Copies of the weights stand in the model inside: in ``dtype`` those autocast would cast
        (None: none), and with ``folded`` BatchNorms in their convolutions.

        ``learn`` makes a copy require grad where its weight does; ``learning`` names those.
        """
        folds = self.folds if folded else []
        with torch.no_grad():
            copies = self._refreshed(dtype, folds)
        own = {place: place.module._parameters[place.name] for place in copies}
        named = self.model.named_parameters() if learn and copies else ()
        names = {id(weight): name for name, weight in named}
        try:
            for place, weight in own.items():
                copy = copies[place]
                learns = learn and weight is not None and weight.requires_grad
                if learns:
                    self.learning[names[id(weight)]] = copy.learning
                place.module._parameters[place.name] = copy.learning if learns else copy.frozen
            for fold in folds:
                fold.parent._modules[fold.name] = self._identity
            yield
        finally:
            self.learning = {}
            for place, weight in own.items():
                place.module._parameters[place.name] = weight
            for fold in folds:
                fold.parent._modules[fold.name] = fold.norm
            if not folded:
                # BatchNorms at work in a training pass move what is folded.
                for kind in [kind for kind in self._up_to_date if kind.folded]:
                    del self._up_to_date[kind]

    def _refreshed(self, dtype: torch.dtype | None, folds: Sequence[Fold]) -> dict[Place, Copy]:
        """A copy for each place, with the values of this moment.

        They are the same tensors every time, unless the model has changed; a weight that hangs in
        two places has one copy.
        """
        kind = Kind(dtype, bool(folds))
        if kind not in self._up_to_date:
            values = self._values(dtype, folds)
            tensors = list({id(tensor): tensor for tensor in values.values()}.values())
            low = [t.dtype if dtype is None or t.dtype != torch.float32 else dtype for t in tensors]
            copies = self._copies.get(kind, [])
            fit = [copy.fits(t, to) for copy, t, to in zip(copies, tensors, low, strict=False)]
            if len(copies) != len(tensors) or not all(fit):
                copies = [Copy.like(tensor, to) for tensor, to in zip(tensors, low, strict=True)]
                self._copies[kind] = copies
            copy_into([copy.frozen for copy in copies], tensors)
            of = {id(tensor): copy for tensor, copy in zip(tensors, copies, strict=True)}
            self._up_to_date[kind] = {place: of[id(values[place])] for place in values}
        return self._up_to_date[kind]

    def _values(self, dtype: torch.dtype | None, folds: Sequence[Fold]) -> dict[Place, Tensor]:
        """What to copy, by the place where the copy will hang."""
        values = {}
        for fold in folds:
            for name, tensor in zip(("weight", "bias"), fold.weights(), strict=True):
                values[Place(fold.convolution, name)] = tensor
        if dtype is None:
            return values
        done = {fold.convolution for fold in folds}
        for module in self.model.modules():
            if type(module) in LOWERED and module not in done:
                for name in ("weight", "bias"):
                    parameter = module._parameters.get(name)
                    # Autocast leaves float64 as it is.
                    if parameter is not None and parameter.dtype == torch.float32:
                        values[Place(module, name)] = parameter
        return values
