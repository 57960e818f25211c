"""Several processes, one batch: what each finds on its part is brought together here.

A step runs several forwards a backward and takes gradients without ``backward()``, which DDP's
hooks do not see (and, for TRADES, cannot survive: its buffer broadcast changes tensors the
backward needs). So the inner module runs in each process, and this averages what it found. After
every update all processes hold the same weights, buffers and state. Only what a batch is one of
stays each process's own: BatchNorm's statistics while training, the largest entries of AdvLC, the
normalised weights of SAT and GAIRAT.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, distributed


def world_size() -> int:
    """How many processes train together; 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def rank() -> int:
    """The number of this process; 0 without a process group."""
    return distributed.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over all processes, in place, in one message a dtype."""
    count = world_size()
    if count == 1:
        return
    # A list, not a set: every process must send its messages in the same order.
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        distributed.all_reduce(flat)
        flat /= count
        pieces = flat.split([tensor.numel() for tensor in same])
        for tensor, piece in zip(same, pieces, strict=True):
            tensor.copy_(piece.view(tensor.shape))


@torch.no_grad()
def share_rows(stores: Sequence[Tensor], index: Tensor) -> None:
    """Take over the rows of ``stores`` (N,...) that other processes wrote, in place.

    Each process wrote its own rows ``index`` (B,), B the same in all of them.
    """
    if world_size() == 1 or not stores:
        return
    everywhere = _gathered(index)
    for store in stores:
        store.index_copy_(0, everywhere, _gathered(store[index]))


def _gathered(part: Tensor) -> Tensor:
    """The parts (B,...) of all processes, one after another."""
    parts = [torch.empty_like(part) for _ in range(world_size())]
    distributed.all_gather(parts, part.contiguous())
    return torch.cat(parts)


def any_process(said: bool, device: torch.device) -> bool:
    """Whether any process says so; all of them must ask. Waits."""
    if world_size() == 1:
        return said
    flag = torch.tensor(float(said), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)
