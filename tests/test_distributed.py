"""Two processes with half a batch each compute the update of one process with the whole batch."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
from tiny import tiny_batch, tiny_model, tiny_step
from torch import Tensor, distributed, nn
from two_processes import in_two_processes

from fastadv.engine.process.distributed import leave

UPDATES, ROWS = 4, 8
OPTIONS = {
    "pgd": {"steps": 2},
    "awp": {"steps": 2, "warmup_epochs": 0},
    "rwp": {"steps": 2, "warmup_epochs": 0, "weight_steps": 2},
    "apart": {"pad": 0},
    "atta-1": {"pad": 0},
    "trades-te": {"steps": 2, "te_start": 0, "te_end": 0},
    "trades-sat": {"steps": 2, "sat_start": 0},
    "free": {"replays": 2},
    "swa": {"steps": 2, "average_start": 0},
    "pgd-ema": {"steps": 2},
    "ikl": {"steps": 2, "warmup_epochs": 0},
    "liet": {"renew_every": 3},
    "hat": {"steps": 2, "helper": tiny_model(7).eval()},
    "fat": {"steps": 2},
    "zero-grad": {},
    "ssat": {},
    "fgsm-pco": {"regularizer": "none"},
    "acat": {"steps": 2, "warmup_epochs": 0, "average_start": 1},
    "pgd, soft labels": {"steps": 2},
    "awp, a criterion": {"steps": 2, "warmup_epochs": 0},
}


def squares(logits: Tensor, y: Tensor) -> Tensor:
    return (logits - y).pow(2).mean(1)


def labels(name: str, y: Tensor) -> Tensor:
    """The classes ``y`` (B,), or soft labels or other numbers (B,4) made from them."""
    other = torch.eye(4, dtype=torch.float64)[y] * 0.8 + 0.05
    return y if ", " not in name else other if "soft" in name else other - 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def network() -> nn.Module:
    """BatchNorms use running statistics, because those of half a batch differ from the whole's."""
    model = tiny_model()
    model.bn1.eval()
    model.bn2.eval()
    return model


def batch(update: int) -> tuple[Tensor, Tensor, Tensor]:
    """In the second half of the run every sample is in the other process's part."""
    x, y, index, _ = tiny_batch()
    order = torch.arange(ROWS).roll(ROWS // 2 if update >= UPDATES // 2 else 0)
    return x[order], y[order], index[order]


def trained(method: str, rank: int, world: int, wrap: bool = False) -> dict[str, Tensor]:
    """Weights and state of the step after some updates."""
    model = network()
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    known = {"total_steps": UPDATES, "steps_per_epoch": 2}
    options = OPTIONS[method] | ({"criterion": squares} if "criterion" in method else {})
    name = method.partition(",")[0]
    step = tiny_step(wrapped, name, optimizer=optimizer, **known, **options)
    share = ROWS // world
    mine = slice(share * rank, share * rank + share)
    metrics = {}
    for update in range(UPDATES):
        x, y, index = batch(update)
        metrics = step(x[mine], labels(method, y)[mine], index[mine])
    state = {name: value for name, value in step.state.items() if method != "free"}
    return model.state_dict() | state | metrics


def worker(rank: int, port: int, out: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    results = {method: trained(method, rank, 2, wrap=method == "pgd") for method in OPTIONS}
    torch.save(results, f"{out}.{rank}")
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """The results of each process, for each method."""
    out = str(tmp_path_factory.mktemp("processes") / "results")
    in_two_processes(worker, free_port(), out)
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


@pytest.mark.parametrize("method", OPTIONS)
def test_halves_equal_the_whole(method: str, results: list[dict[str, dict[str, Tensor]]]) -> None:
    whole = trained(method, 0, 1)
    if method == "trades-sat":  # its weights are normalised over each process's own batch
        whole = results[0][method]
    for process in results:
        found = process[method]
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


def statistics_worker(rank: int, port: int, out: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = tiny_model()
    step = tiny_step(model, "pgd", steps=2)
    for update in range(2):
        x, y, index = batch(update)
        mine = slice(4 * rank, 4 * rank + 4)
        step(x[mine], y[mine], index[mine])
    torch.save(model.state_dict(), f"{out}.{rank}")
    leave()


def test_running_statistics_are_the_same_in_every_process(tmp_path: Path) -> None:
    out = str(tmp_path / "model")
    in_two_processes(statistics_worker, free_port(), out)
    first, second = (torch.load(f"{out}.{rank}") for rank in range(2))
    assert not torch.equal(first["bn1.running_mean"], tiny_model().bn1.running_mean)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
