"""Which of the processes that train together this one is, and what it knows of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed

from fastadv.engine.process.one_voice import is_first
from fastadv.engine.process.peers import Peers


class State:
    """What this process has sent to the others and heard from them since it joined them. All
    processes count alike."""

    def __init__(self) -> None:
        self.peers: Peers | None = None
        self.messages = 0
        self.calls = 0
        self.agreements = 0
        self.signals = 0
        self.told = ""
        self.received: BaseException | None = None


state = State()
_alone = False


@contextmanager
def new_state() -> Iterator[State]:
    """Within this context ``state`` is that of a new group: nothing of one before is believed."""
    global state
    outer, state = state, State()
    try:
        yield state
    finally:
        state = outer


def store() -> Any:
    """The group's store of words, which process 0 or torchrun holds."""
    whole = distributed.distributed_c10d._get_default_store()
    return distributed.PrefixStore("fastadv", whole)  # type: ignore[attr-defined]


def local_rank() -> int:
    """The number of this process on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def speaks() -> bool:
    """True in the process that writes to the terminal, also before it has joined the others."""
    return is_first() if world_size() == 1 else rank() == 0


def world_size() -> int:
    """The number of processes that train together; 1 without a process group."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()
    return 1


def rank() -> int:
    """The number of this process; 0 without a process group."""
    return distributed.get_rank() if world_size() > 1 else 0


def sharing() -> int:
    """The number of processes that hold parts of the present batch: 1 where each holds the whole of
    it (``alone``)."""
    if not _alone and distributed.is_available() and distributed.is_initialized():
        return distributed.get_world_size()  # not through world_size: a step asks often
    return 1


@contextmanager
def alone() -> Iterator[None]:
    """Within this context ``average`` and ``share_rows`` send nothing: the other processes do not
    call them now, or each has the whole batch (``division.py``)."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def where() -> torch.device:
    """The device that the group's messages are on."""
    return torch.device("cuda" if distributed.get_backend() == "nccl" else "cpu")
