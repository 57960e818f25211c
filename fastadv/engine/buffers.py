"""Keep the values of many small tensors for a while: BatchNorm's running statistics, above all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Snapshot:
    """The values of ``tensors`` at one moment, one after the other in one tensor a data type.

    A network has dozens of small buffers. To keep, choose between and put back all of them takes
    a few launches this way, where one by one it would take dozens, each as dear as a large one.
    """

    @torch.no_grad()
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        kinds = dict.fromkeys((tensor.device, tensor.dtype) for tensor in tensors)
        self._groups = [
            [tensor for tensor in tensors if (tensor.device, tensor.dtype) == kind]
            for kind in kinds
        ]
        self._values = [_flat(group) for group in self._groups]

    @torch.no_grad()
    def put_back(self) -> None:
        """The tensors hold again what they held."""
        for group, values in zip(self._groups, self._values, strict=True):
            _fill(group, values)

    @torch.no_grad()
    def put_back_unless(self, ok: Tensor) -> None:
        """``put_back`` where ``ok`` (0-dim bool) is false, without asking the device."""
        for group, values in zip(self._groups, self._values, strict=True):
            _fill(group, torch.where(ok, _flat(group), values))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _fill(tensors: Sequence[Tensor], values: Tensor) -> None:
    parts = values.split([tensor.numel() for tensor in tensors])
    copy_into(tensors, [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])


@contextmanager
def kept(tensors: Sequence[Tensor]) -> Iterator[None]:
    """The tensors hold the same values after the region as before."""
    before = Snapshot(tensors)
    try:
        yield
    finally:
        before.put_back()


@torch.no_grad()
def copy_into(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy ``values`` into ``tensors`` in place; one launch where all are of one data type."""
    if tensors:
        torch._foreach_copy_(list(tensors), list(values))
