"""Several processes, one batch: gradients are averaged here, outside DDP's own hooks.

A step runs several forwards a backward and takes gradients without ``backward()``, which DDP's
hooks do not see (and, for TRADES, cannot survive: its buffer broadcast changes tensors the
backward needs). So the inner module runs in each process and this averages what it found.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in place, in one message a dtype."""
    count = world_size()
    if count == 1:
        return
    for dtype in {tensor.dtype for tensor in tensors}:
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        distributed.all_reduce(flat)
        flat /= count
        pieces = flat.split([tensor.numel() for tensor in same])
        for tensor, piece in zip(same, pieces, strict=True):
            tensor.copy_(piece.view(tensor.shape))
