"""How a process joins the others that torchrun has started, and leaves them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from fastadv.engine.process.distributed import group
from fastadv.engine.process.distributed.failures import (
    end_here,
    failure_told,
    first_line,
    sentence_of_the_end,
)
from fastadv.engine.process.peers import Peers
from fastadv.errors import UserError

# The other processes wait while the first one decodes a data set, or evaluates more slowly.
GROUP_TIMEOUT = timedelta(hours=6)
# While all train, none is much slower than the others.
TRAINING_TIMEOUT = timedelta(minutes=15)


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Within this context the process is in the group that torchrun asks for in the environment;
    without torchrun nothing happens."""
    if group.world_size() > 1 or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    with group.new_state() as state:
        try:
            store, rank, world = _new_store()
            distributed.init_process_group(
                backend, timeout=GROUP_TIMEOUT, store=store, rank=rank, world_size=world
            )
            peers = state.peers = Peers(group.store(), group.rank(), group.world_size())
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"The processes could not find each other ({first_line(error)}): start all of them "
                "with torchrun, with the same address and number of processes."
            ) from None
        if device.type == "cuda":
            peers.end_if_lost(sentence_of_the_end, end_here)
        try:
            with failure_told(final=True):
                yield
        finally:
            peers.leave()
            state.peers = None
            leave()


_stores: dict[tuple[str | None, ...], tuple[Any, int, int]] = {}
_groups = 0  # that this process was in


def _new_store() -> tuple[Any, int, int]:
    """An empty store that this group has to itself, the number of this process and how many there
    are. What they are in stays until the process ends: that of torchrun outlives a group anyway,
    and one that process 0 holds would be gone while another process joins the next group."""
    global _groups
    place = tuple(os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"))
    if place not in _stores:
        _stores[place] = next(
            distributed.rendezvous("env://", timeout=GROUP_TIMEOUT)  # type: ignore[attr-defined]
        )
    whole, rank, world = _stores[place]
    whole.set_timeout(GROUP_TIMEOUT)
    _groups += 1
    return distributed.PrefixStore(f"group {_groups}", whole), rank, world  # type: ignore[attr-defined]


@contextmanager
def short_timeout() -> Iterator[None]:
    """Within this context no process waits longer for another than ``TRAINING_TIMEOUT``."""
    if group.world_size() == 1:
        yield
        return
    distributed.distributed_c10d._set_pg_timeout(TRAINING_TIMEOUT)
    try:
        yield
    finally:
        distributed.distributed_c10d._set_pg_timeout(GROUP_TIMEOUT)


def leave() -> None:
    """Leave the group, as the last thing before the process ends.

    A thread of gloo gives the tensor of the last message back shortly after the message has
    completed and needs Python for it; the process would abort if Python had ended before.
    """
    time.sleep(0.1)
    distributed.destroy_process_group()
