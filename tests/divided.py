"""Runs of a recipe in which several processes share each batch, and their distance to that of one
process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any

import torch
from every_recipe import arguments, step_of
from tiny_staged import staged_model
from torch import Tensor, distributed, multiprocessing
from two_processes import IMPORTED

from fastadv.data.view import View
from fastadv.engine.process.distributed import leave
from fastadv.training.training_step import Step

COUNTS = (8, 5)  # images of the batches of an epoch: the last one is shorter, and no equal parts
EPOCHS = 4

Share = Callable[[int, int, int], slice]


def even(count: int, rank: int, world: int) -> slice:
    """The rows of process ``rank``: as many as in the others, or one more."""
    return slice(count * rank // world, count * (rank + 1) // world)


def uneven(count: int, rank: int, world: int) -> slice:
    """One row for each process but the last one, which has the rest."""
    return slice(rank, rank + 1 if rank < world - 1 else count)


def part(given: dict[str, Any], rows: slice) -> dict[str, Any]:
    """The arguments of a call for the images ``rows``."""
    found = {name: value[rows] for name, value in given.items() if isinstance(value, Tensor)}
    if "view" in given:
        found["view"] = View(*(each[rows] for each in given["view"]))
    return found


def train(step: Step, updates: Sequence[int], rank: int, world: int, share: Share = even) -> None:
    """Make the ``updates`` with the own part of each batch."""
    for update in updates:
        given = arguments(step, update, COUNTS[update % len(COUNTS)])
        step(**part(given, share(len(given["x"]), rank, world)))


def trained(
    method: str, rank: int, world: int, share: Share = even, epochs: int = EPOCHS
) -> dict[str, Tensor]:
    """Weights, buffers and state after ``epochs`` epochs of ``method``."""
    step = step_of(method, staged_model(), epoch_length=len(COUNTS), epochs=epochs, bn="global")
    train(step, range(epochs * len(COUNTS)), rank, world, share)
    return everything(step)


def everything(step: Step) -> dict[str, Tensor]:
    """Copies of the weights, the buffers and the state of ``step``."""
    every = {**step.model.state_dict(), **step.state}
    return {name: tensor.detach().clone() for name, tensor in every.items()}


def distance(found: dict[str, Tensor], whole: dict[str, Tensor]) -> float:
    """The largest difference of a tensor, relative to its largest entry."""
    assert found.keys() == whole.keys()
    worst = 0.0
    for name, value in whole.items():
        if not value.numel():
            continue
        wide, other = value.double(), found[name].double()
        assert wide.isfinite().all(), name
        size = max(float(wide.abs().max()), 1e-3)
        worst = max(worst, float((wide - other).abs().max()) / size)
    return worst


def port() -> int:
    """A free port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def join(rank: int, world: int, at: int) -> None:
    """Enter a group of ``world`` processes."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{at}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world)


def worker(rank: int, world: int, at: int, out: str, methods: Sequence[str]) -> None:
    """Write what each of ``methods`` trains in this process, or the error that it ends with."""
    join(rank, world, at)
    found: dict[str, Any] = {}
    for method in methods:
        try:
            found[method] = trained(method, rank, world)
        except Exception as error:
            found[method] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{out}.{rank}")
    leave()


def in_processes(work: Callable[..., None], world: int, *arguments: Any) -> None:
    """Call ``work(rank, world, port, *arguments)`` in ``world`` processes."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    given = (world, port(), *arguments)
    multiprocessing.start_processes(work, given, nprocs=world, start_method="forkserver")


def results(world: int, methods: Sequence[str], out: str) -> list[dict[str, Any]]:
    """Of each process, method -> what it trained."""
    in_processes(worker, world, out, methods)
    return [torch.load(f"{out}.{rank}") for rank in range(world)]
