"""One group of processes after another, as with several seeds; the store of torchrun stays."""

from __future__ import annotations

import os

import pytest
import torch
from torch.distributed import TCPStore
from two_processes import in_two_processes

from fastadv.engine.process import distributed
from fastadv.engine.process.distributed import group
from fastadv.errors import ProcessLost, TrainingError

CPU = torch.device("cpu")


def diverge(rank: int) -> None:
    if rank == 1:
        raise TrainingError("the first seed diverged")
    distributed.wait()


def end(rank: int) -> None:
    if rank == 1:
        os._exit(0)  # it has left two groups in order, and not this one
    distributed.wait()


def in_turn(rank: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with pytest.raises(TrainingError, match="the first seed diverged"), distributed.joined(CPU):
        diverge(rank)
    with distributed.joined(CPU):
        mean = torch.tensor([1.0 + rank])
        distributed.average([mean])
        assert mean.item() == 1.5
        said = distributed.told_by_all(f"second {rank}", distributed.AGREEMENT_TIMEOUT)
        assert said == ["second 0", "second 1"]
    lost = pytest.raises(ProcessLost, match="Process 1 has ended without a word")
    with lost, distributed.joined(CPU):
        end(rank)


def test_nothing_that_one_group_was_told_is_believed_in_the_next() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    in_two_processes(in_turn, store.port)


def test_the_counters_are_those_of_one_group() -> None:
    before = group.state
    with group.new_state() as first:
        first.calls = first.agreements = 3
        assert group.state is first
    with group.new_state() as second:
        assert (second.calls, second.agreements) == (0, 0)
    assert group.state is before
