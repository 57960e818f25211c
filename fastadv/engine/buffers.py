"""Run a pass without moving the running statistics of BatchNorm (or any other buffer)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def kept(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Buffers hold the same values after the region as before."""
    with torch.no_grad():
        before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        copy_into(buffers, before)


@torch.no_grad()
def copy_into(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy ``values`` into ``tensors`` in place, one launch a data type."""
    if tensors:
        torch._foreach_copy_(list(tensors), list(values))
