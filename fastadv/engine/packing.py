"""Joins small tensors before they are copied or reduced: on a CPU a call per tensor costs more
than the work on its values."""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

SMALL = 1 << 16  # values; reading a larger tensor takes longer than calling an operator


def packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors with the values of ``tensors``, in another order. On a CPU small ones of the first
    tensor's data type are copied into one; all others are returned as they are."""
    if len(tensors) < 2 or tensors[0].device.type != "cpu":
        return list(tensors)
    small, others = _split(tensors)
    if len(small) < 2:
        return list(tensors)
    return [*others, torch._C._nn.flatten_dense_tensors(small)]


def _split(tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Small tensors of the first one's data type, and the others."""
    first = tensors[0]
    small: list[Tensor] = []
    others: list[Tensor] = []
    for tensor in tensors:
        joins = tensor.numel() <= SMALL and tensor.dtype is first.dtype
        joins = joins and tensor.layout is torch.strided and tensor.device == first.device
        (small if joins else others).append(tensor)
    return small, others


class FlatViews:
    """1-dim views of tensors, created again only if a tensor, its address or its size changed."""

    def __init__(self) -> None:
        self.views: list[Tensor] = []
        self.flat = True  # False if one is its own view and not 1-dim
        self._tensors: list[Tensor] = []
        self._where: list[int] = []
        self._small: list[Tensor] = []
        self._others: list[Tensor] = []
        self._join: Any = torch.cat

    def follow(self, tensors: list[Tensor]) -> bool:
        """Set ``views`` to those of ``tensors``; returns True if they are new.

        A tensor that is not contiguous is its own view.
        """
        where = [*map(Tensor.data_ptr, tensors), *map(Tensor.numel, tensors)]
        if where == self._where and all(map(is_, tensors, self._tensors)):
            return False
        self._where = []  # stays empty if an error follows
        self.views = [t.detach().view(-1) if t.is_contiguous() else t.detach() for t in tensors]
        self.flat = all(view.dim() == 1 for view in self.views)
        self._small, self._others = [], self.views
        if self.views and self.views[0].device.type == "cpu":
            self._small, self._others = _split(self.views)
            flat = all(view.dim() == 1 for view in self._small)
            self._join = torch.cat if flat else torch._C._nn.flatten_dense_tensors
        self._tensors, self._where = tensors, where
        return True

    def packed(self) -> list[Tensor]:
        """``packed`` of the views, with their present values."""
        if len(self._small) < 2:
            return self.views
        return [*self._others, self._join(self._small)]

    def __getstate__(self) -> dict[str, Any]:
        return vars(FlatViews())  # a copy creates its own views
