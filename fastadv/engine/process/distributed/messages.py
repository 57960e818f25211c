"""Messages between the processes: tensors, averaged or put together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed

from fastadv.engine.process.distributed import group
from fastadv.engine.process.distributed.failures import broken, finished, of_another


def wait() -> None:
    """Wait until every process has called this."""
    if group.world_size() > 1:
        _summed(torch.zeros(1, device=group.where()))


@contextmanager
def first_alone() -> Iterator[None]:
    """Process 0 runs the block before the others, which can then read the files it wrote."""
    if group.rank() != 0:
        wait()
    yield
    if group.rank() == 0:
        wait()


@torch.no_grad()
def average(tensors: Sequence[Tensor], images: int = 1, unit: int = 1) -> None:
    """Replace each tensor, a mean over ``images`` images of this process, by the mean over those of
    all processes, in place, in one message per dtype.

    ``unit`` is a usual number of images, the same in all processes: no product is much larger than
    the tensors.
    """
    if group.sharing() == 1:
        return
    # The number of images is exact in float32, in which it is sent.
    own = torch.full((1,), images, device=tensors[0].device, dtype=torch.float32)
    sent: list[tuple[list[Tensor], Tensor]] = []
    # A list, not a set: every process must send its messages in the same order.
    for dtype in dict.fromkeys([own.dtype, *(tensor.dtype for tensor in tensors)]):
        same = [tensor for tensor in tensors if tensor.dtype == dtype]
        last = [own] if dtype == own.dtype else []
        flat = torch.cat([*(tensor.reshape(-1) for tensor in same), *last])
        values = flat[: len(flat) - len(last)]
        if images != unit:
            values *= images / unit
        _summed(flat)
        sent.append((same, values))
        own = flat[-1:] if last else own
    units = own.squeeze(0).double() / unit
    for same, values in sent:
        values /= units
        pieces = values.split([tensor.numel() for tensor in same])
        shaped = [piece.view(tensor.shape) for tensor, piece in zip(same, pieces, strict=True)]
        if same:  # no tensor has the dtype of the number of images
            torch._foreach_copy_(same, shaped)


def add_up(tensor: Tensor) -> None:
    """Replace ``tensor`` by its sum over all processes, in place."""
    if group.world_size() > 1:
        _summed(tensor)


@torch.no_grad()
def share_rows(stores: Sequence[Tensor], index: Tensor, room: int) -> None:
    """Copy the rows of ``stores`` (N,...) that other processes wrote, in place.

    Each process wrote its own rows ``index`` (B,). B may differ between processes up to ``room``,
    which is the same in all of them; messages are filled up to that length with the last row.
    """
    if group.sharing() == 1 or not stores:
        return
    index = torch.cat([index, index[-1:].expand(max(0, room - len(index)))])
    everywhere = every_row(index)
    for store in stores:
        store.index_copy_(0, everywhere, every_row(store[index]))


def every_row(part: Tensor) -> Tensor:
    """The parts (b,...) of all processes, of the same shape in all, one after another. All
    processes must call it."""
    parts = [torch.empty_like(part) for _ in range(group.world_size())]
    part = part.contiguous()
    finished(part, lambda wait: distributed.all_gather(parts, part, async_op=not wait))
    return torch.cat(parts)


def _summed(flat: Tensor) -> None:
    finished(flat, lambda wait: distributed.all_reduce(flat, async_op=not wait))


def collected(own: Any) -> list[Any]:
    """In process 0 the objects ``own`` of all processes, in the order of ranks; an empty list in
    the others."""
    if group.world_size() == 1:
        return [own]
    found: list[Any] = [None] * group.world_size() if group.rank() == 0 else []
    since = time.monotonic()
    try:
        distributed.gather_object(own, found or None)
    except RuntimeError as error:
        raise of_another(broken(error, since)) from None
    return found


def every_part(own: bytes) -> list[bytes]:
    """The ``own`` bytes of all processes, which may differ in length, in the order of ranks. All
    processes must call it."""
    if group.world_size() == 1:
        return [own]
    device = group.where()
    length = torch.tensor([len(own)], device=device)
    lengths = every_row(length).tolist()
    if not max(lengths):
        return [b""] * group.world_size()
    part = torch.zeros(max(lengths), dtype=torch.uint8)
    part[: len(own)] = torch.frombuffer(bytearray(own or b"\0"), dtype=torch.uint8)[: len(own)]
    whole = every_row(part.to(device)).cpu().view(group.world_size(), -1)
    return [bytes(row[:n].numpy()) for row, n in zip(whole, lengths, strict=True)]


def any_process(said: bool, device: torch.device) -> bool:
    """True if ``said`` is true in any process. All processes must call it; waits for the device."""
    return bool(most([float(said)], device)[0])


def most(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each of ``values`` (float32) in any process. All processes must call it; waits
    for the device."""
    if group.world_size() == 1:
        return list(values)
    found = torch.tensor(values, device=device, dtype=torch.float32)
    largest = distributed.ReduceOp.MAX
    finished(found, lambda wait: distributed.all_reduce(found, largest, async_op=not wait))
    return found.tolist()
