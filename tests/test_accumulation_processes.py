"""Two processes with uneven calls compute the update of one process with all their images."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from test_accumulation import network, step_on
from test_distributed import free_port
from tiny import tiny_batch
from tiny_capture import capture
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_two_processes

import fastadv
from fastadv.engine.process.distributed import leave

COUNT, UPDATES = 16, 3
# The images of one update: process -> sizes of its calls.
SIZES = {
    "several": ((5, 2, 3), (1, 4, 1)),
    "one": ((10,), (6,)),
    "whole": ((16,),),
}
METHODS = {
    "several": ("pgd", "trades-te", "atta-1", "captured", "ddp"),
    "one": ("pgd", "awp", "apart", "trades-te"),
}


def batch(number: int) -> tuple[Tensor, Tensor, Tensor]:
    x, y, *_ = tiny_batch(COUNT, seed=number)
    return x, y, torch.randperm(40, generator=torch.Generator().manual_seed(number))[:COUNT]


def trained(what: str, method: str, rank: int = 0) -> dict[str, Tensor]:
    """Weights and state after some updates, the loss of the last call, and the number of messages
    in calls that do not update."""
    model = network()
    options = {"pad": 0} if method in ("atta-1", "apart") else {}
    kind = method if method not in ("captured", "ddp") else "pgd"
    wrapped = DistributedDataParallel(model) if method == "ddp" and what != "whole" else model
    step = step_on(wrapped, kind, **options)  # type: ignore[arg-type]
    step = capture(step) if method == "captured" else step
    sizes = SIZES[what]
    begin = sum(map(sum, sizes[:rank]))
    sent, loss = 0, torch.zeros(())
    for number in range(UPDATES):
        x, y, index = batch(number)
        end = begin
        for place, size in enumerate(sizes[rank]):
            part = slice(end, end + size)
            end += size
            last = place == len(sizes[rank]) - 1
            with mock.patch.object(distributed, "all_reduce", wraps=distributed.all_reduce) as told:
                loss = step(x[part], y[part], index[part], update=last)["loss"]
            # The first call agrees on the model.
            sent += told.call_count if not last and number else 0
    state = {name: value for name, value in step.state.items() if name not in step.rank_local_state}
    return {**model.state_dict(), **state, "loss": loss, "sent": torch.tensor(sent)}


def one_bad_call(rank: int) -> dict[str, Any]:
    """Only process 0 has a fault, in the first of two calls, which only the device may read."""
    model = network()
    step = capture(step_on(model))
    kept: dict[str, Tensor] = {}
    for number in range(3):
        x, y, index = batch(number)
        kept = copy.deepcopy(model.state_dict()) if number == 1 else kept
        for place in range(2):
            part = slice(8 * rank + 4 * place, 8 * rank + 4 * place + 4)
            # A label that is clamped leaves a finite gradient behind.
            labels = y[part] - (9 if (rank, number, place) == (0, 1, 0) else 0)
            step(x[part], labels, index[part], update=place == 1)
    with pytest.raises(fastadv.TrainingError) as caught:
        step.check()
    same = all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    return {"said": str(caught.value), "same": same}


def worker(rank: int, port: int, out: str) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    found: dict[str, Any] = {
        f"{what}-{method}": trained(what, method, rank)
        for what, methods in METHODS.items()
        for method in methods
    }
    torch.save(found | {"bad": one_bad_call(rank)}, f"{out}.{rank}")
    leave()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = str(tmp_path_factory.mktemp("processes") / "results")
    in_two_processes(worker, free_port(), out)
    return [torch.load(f"{out}.{rank}") for rank in range(2)]


CASES = [(what, method) for what, methods in METHODS.items() for method in methods]


@pytest.mark.parametrize(("what", "method"), CASES)
def test_uneven_calls_equal_the_whole(
    what: str, method: str, results: list[dict[str, Any]]
) -> None:
    whole = trained("whole", method)
    for process in results:
        found = process[f"{what}-{method}"]
        assert found.keys() == whole.keys()
        for name in whole.keys() - {"loss", "sent"}:
            torch.testing.assert_close(found[name], whole[name], rtol=0, atol=1e-12, msg=name)
    first, second = (process[f"{what}-{method}"] for process in results)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    if what == "one":
        torch.testing.assert_close(first["loss"], whole["loss"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", METHODS["several"])
def test_a_call_that_does_not_update_sends_no_gradient(
    method: str, results: list[dict[str, Any]]
) -> None:
    assert all(int(process[f"several-{method}"]["sent"]) == 0 for process in results)


def test_a_fault_in_an_earlier_call_masks_the_update_of_all(results: list[dict[str, Any]]) -> None:
    for process in results:
        said = process["bad"]["said"]
        assert "Labels were outside of the model's classes" in said
        assert " at step 1;" in said
        assert process["bad"]["same"]


def test_the_loss_is_the_mean_over_the_images_of_the_last_call(
    results: list[dict[str, Any]],
) -> None:
    """At the weights before the last update, which a run of fewer updates has."""
    model = network()
    step = step_on(model)
    for number in range(UPDATES - 1):
        step(*batch(number))
    x, y, index = batch(UPDATES - 1)
    last = [*range(7, 10), 15]  # the last call's images of process 0 and 1
    loss = step(x[last], y[last], index[last])["loss"]
    torch.testing.assert_close(results[0]["several-pgd"]["loss"], loss, rtol=0, atol=1e-12)
