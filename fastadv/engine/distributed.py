"""Several processes, one batch: what each finds on its part is brought together here.

A step runs several forwards a backward and takes gradients without ``backward()``, which DDP's
hooks do not see (and, for TRADES, cannot survive: its buffer broadcast changes tensors the
backward needs). So the inner module runs in each process, and this averages what it found. After
every update all processes hold the same weights, buffers and state. What is taken over a batch, or
carried from one to the next, stays each process's own: BatchNorm's statistics while training, the
largest entries of AdvLC, the normalised weights of SAT and GAIRAT, Free's perturbation, dropout's
masks.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

# The first process decodes a data set while the others wait.
PATIENCE = timedelta(hours=6)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """The process group torchrun asks for in its environment; nothing where there is none."""
    if world_size() > 1 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def local_rank() -> int:
    """The number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def wait() -> None:
    """Until every process is here."""
    if world_size() > 1:
        distributed.barrier()


@contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 runs the block before the others do: it leaves files that they find."""
    if rank() != 0:
        wait()
    yield
    if rank() == 0:
        wait()


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


def add_up(tensor: Tensor) -> None:
    """Replace ``tensor`` by its sum over all processes, in place."""
    if world_size() > 1:
        distributed.all_reduce(tensor)


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


def collected(own: Any) -> list[Any]:
    """What each process brings, in their order, in process 0; nothing in the others."""
    if world_size() == 1:
        return [own]
    found: list[Any] = [None] * world_size() if rank() == 0 else []
    distributed.gather_object(own, found or None)
    return found


def any_process(said: bool, device: torch.device) -> bool:
    """Whether any process says so; all of them must ask. Waits."""
    if world_size() == 1:
        return said
    flag = torch.tensor(float(said), device=device)
    distributed.all_reduce(flag, distributed.ReduceOp.MAX)
    return bool(flag)
