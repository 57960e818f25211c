"""Copies of the weights for the passes of an update, computed once per state of the weights.

In low precision autocast would cast every weight again in every pass, eleven times for PGD-10. Its
cache ignores changes of the weights in place (``precision.py``), so the copies are made here. With
running statistics BatchNorms are also folded into the convolutions before them
(``bn_folding.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastadv.engine.model.bn_fold import CONVOLUTIONS, Fold
from fastadv.engine.model.bn_folding import Folding
from fastadv.engine.model.buffers import copy_into
from fastadv.engine.model.padded_channels import channels_wanted, padded_weight, replaced

# Modules that pass weight and bias to an operation that autocast lowers. Subclasses are excluded:
# they may first compute something from the weight (standardise it) that needs its full precision.
# Code outside of such a module that reads its weight gets the copy.
LOWERED = (*CONVOLUTIONS, nn.Linear)


class Copy(NamedTuple):
    """Two Parameters over one storage: one frozen for attack passes, one trainable for the outer
    pass. ``padded`` is the copy with channels of zeros behind its own, if a convolution needs it.
    """

    frozen: nn.Parameter
    learning: nn.Parameter
    padded: Copy | None = None

    @classmethod
    def of(cls, values: Tensor, padded: Copy | None = None) -> Copy:
        """A copy whose storage is that of ``values``."""
        frozen = nn.Parameter(values, requires_grad=False)
        return cls(frozen, nn.Parameter(frozen.detach()), padded)

    @classmethod
    def like(cls, tensor: Tensor, dtype: torch.dtype, channels: int) -> Copy:
        """A copy with the shape of ``tensor`` and uninitialised values, padded to ``channels``
        unless they are 0."""
        values = torch.empty_like(tensor, dtype=dtype)
        return cls.of(values, cls.of(padded_weight(values, channels)) if channels else None)

    def fits(self, tensor: Tensor, dtype: torch.dtype, channels: int) -> bool:
        """True if this copy has the shape and device of ``tensor``, the type ``dtype``, and the
        padding to ``channels``."""
        own = self.frozen
        alike = (own.shape, own.device, own.dtype) == (tensor.shape, tensor.device, dtype)
        return alike and channels == (0 if self.padded is None else self.padded.frozen.shape[1])


class Place(NamedTuple):
    """The place of a parameter: ``module._parameters[name]``."""

    module: nn.Module
    name: str


class WeightCopies:
    """Copies of the weights of ``model`` by data type, and its folds, which are used in passes with
    running statistics.

    Call ``invalidate`` after every in-place change of the weights; until then all passes use the
    same copies.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.folding = Folding()
        self.learning: dict[str, nn.Parameter] = {}  # name of a weight -> its installed copy
        self.learning_padded: dict[str, nn.Parameter] = {}  # the same, with more channels
        self.padded: list[nn.Conv2d] = []  # convolutions that get padded images
        self._copies: dict[torch.dtype | None, list[Copy]] = {}
        self._up_to_date: dict[torch.dtype | None, dict[Place, Copy]] = {}

    @property
    def folds(self) -> list[Fold]:
        """The folds in use; those that turn out to be wrong are removed."""
        return self.folding.folds

    @folds.setter
    def folds(self, folds: list[Fold]) -> None:
        self.folding.folds = folds
        self.invalidate()

    def __getstate__(self) -> dict[str, Any]:
        # The two parameters of a ``Copy`` share their memory, which copying would not keep.
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
        """Within this context the model has copies in ``dtype`` of the weights that autocast would
        cast (None: no copies), and with ``folded`` its BatchNorms are folded.

        ``learn`` is name -> parameter of the model, for those whose copies are to require grad as
        they do; these copies are in ``learning``, and those with more channels in
        ``learning_padded``.
        """
        if dtype is None and not folded:
            try:
                yield
            finally:
                self.folding.invalidate()  # a training pass changes BatchNorm's statistics
            return
        with torch.no_grad():
            used = self.folding.refreshed(dtype) if folded else []
            copies = self._refreshed(dtype)
        own = {place: place.module._parameters[place.name] for place in copies}
        names = {id(weight): name for name, weight in (learn or {}).items()}
        padded: list[tuple[nn.Conv2d, nn.Parameter, nn.Parameter]] = []
        try:
            for place, weight in own.items():
                copy, wide = copies[place], copies[place].padded
                learns = weight is not None and id(weight) in names and weight.requires_grad
                if learns:
                    self.learning[names[id(weight)]] = copy.learning
                    if wide is not None:
                        self.learning_padded[names[id(weight)]] = wide.learning
                installed = copy.learning if learns else copy.frozen
                place.module._parameters[place.name] = installed
                if wide is not None and place.module in self.padded:
                    second = wide.learning if learns else wide.frozen
                    padded.append((place.module, installed, second))
            with replaced(padded), self.folding.at_work(used):
                yield
        finally:
            self.learning, self.learning_padded = {}, {}
            for place, weight in own.items():
                place.module._parameters[place.name] = weight
            if not folded:
                self.folding.invalidate()  # a training pass changes BatchNorm's statistics

    def _refreshed(self, dtype: torch.dtype | None) -> dict[Place, Copy]:
        """Place -> copy with the present values.

        The copies are always the same tensors, unless the model has changed. A weight that is in
        two places has one copy.
        """
        if dtype not in self._up_to_date:
            values = self._values(dtype)
            channels = self._channels(values)
            tensors = list({id(tensor): tensor for tensor in values.values()}.values())
            low = [t.dtype if dtype is None or t.dtype != torch.float32 else dtype for t in tensors]
            copies = self._copies.get(dtype, [])
            wanted = [(t, to, channels.get(id(t), 0)) for t, to in zip(tensors, low, strict=True)]
            fit = [copy.fits(*each) for copy, each in zip(copies, wanted, strict=False)]
            if len(copies) != len(tensors) or not all(fit):
                copies = [Copy.like(*each) for each in wanted]
                self._copies[dtype] = copies
            copy_into([copy.frozen for copy in copies], tensors)
            for copy in copies:
                if copy.padded is not None:
                    copy.padded.frozen[:, : copy.frozen.shape[1]].copy_(copy.frozen)
            of = {id(tensor): copy for tensor, copy in zip(tensors, copies, strict=True)}
            self._up_to_date[dtype] = {place: of[id(values[place])] for place in values}
        return self._up_to_date[dtype]

    def _channels(self, values: Mapping[Place, Tensor]) -> dict[int, int]:
        """id of a weight in ``values`` -> its number of channels with padding."""
        found = {}
        for convolution in self.padded:
            weight = values.get(Place(convolution, "weight"))
            if weight is not None:
                found[id(weight)] = channels_wanted(convolution)
        return found

    def _values(self, dtype: torch.dtype | None) -> dict[Place, Tensor]:
        """Place -> weight to copy."""
        values: dict[Place, Tensor] = {}
        if dtype is None:
            return values
        for module in self.model.modules():
            if type(module) in LOWERED:
                for name in ("weight", "bias"):
                    parameter = module._parameters.get(name)
                    # Autocast does not cast float64.
                    if parameter is not None and parameter.dtype == torch.float32:
                        values[Place(module, name)] = parameter
        return values
