"""Small tensors joined before a reduction: on a CPU a call costs more than their values."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SMALL = 1 << 16  # values; from here on, reading a tensor takes longer than calling an operator


def packed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors with the values of ``tensors``, in another order: on a CPU, small ones of the first
    tensor's data type are copied into one; all others are returned as they are."""
    if len(tensors) < 2 or tensors[0].device.type != "cpu":
        return list(tensors)
    first = tensors[0]
    small: list[Tensor] = []
    others: list[Tensor] = []
    for tensor in tensors:
        joins = tensor.numel() <= SMALL and tensor.dtype is first.dtype
        joins = joins and tensor.layout is torch.strided and tensor.device == first.device
        (small if joins else others).append(tensor)
    if len(small) < 2:
        return list(tensors)
    return [*others, torch._C._nn.flatten_dense_tensors(small)]
