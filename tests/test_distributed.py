"""Two processes with half a batch each make the update of one process with the whole batch."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from test_step import smooth_model
from tiny import tiny_batch, tiny_step
from torch import distributed, multiprocessing


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def worker(rank: int, port: int, method: str, wrap: bool, out: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = smooth_model()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if wrap else model
    x, y, index, _ = tiny_batch()
    mine = slice(4 * rank, 4 * rank + 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    step = tiny_step(wrapped, method, steps=2, optimizer=optimizer)
    for _ in range(3):
        step(x[mine], y[mine], index[mine])
    torch.save(model.state_dict(), f"{out}.{rank}")
    distributed.destroy_process_group()


@pytest.mark.parametrize(("method", "wrap"), [("pgd", True), ("awp", False)])
def test_halves_equal_the_whole(method, wrap, tmp_path: Path):
    out = str(tmp_path / "weights")
    multiprocessing.spawn(worker, (free_port(), method, wrap, out), nprocs=2)
    model = smooth_model()
    x, y, index, _ = tiny_batch()
    step = tiny_step(model, method, steps=2)
    for _ in range(3):
        step(x, y, index)
    for rank in range(2):
        saved = torch.load(f"{out}.{rank}")
        for name, value in model.state_dict().items():
            torch.testing.assert_close(saved[name], value, rtol=1e-9, atol=1e-12)
