"""Processes that take different branches, have batches of other sizes, or fail: two of them."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from test_distributed import free_port
from tiny import tiny_batch, tiny_model, tiny_step
from tiny_capture import capture
from torch import Tensor, distributed, nn
from torch.nn import functional
from two_processes import in_two_processes

import fastadv
from fastadv.engine.process import distributed as own

RATE, STEPS = 0.5, 2


class Experts(nn.Module):
    """Each process takes the branch ``use``; the third branch is taken only when asked for."""

    def __init__(self, same_size: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Linear(8, 4)
        hidden = nn.Sequential(nn.Linear(8, 6), nn.Softplus(), nn.Linear(6, 4))
        self.b = nn.Linear(8, 4) if same_size else hidden
        self.c = nn.Linear(8, 4)
        self.use = "a"

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.use)(functional.softplus(self.conv(x)).mean((2, 3)))


def experts(same_size: bool) -> Experts:
    torch.manual_seed(0)
    return Experts(same_size).double()


def branch(rank: int, number: int, three: bool) -> str:
    return "abc"[(rank + number) % 3] if three else "ab"[rank]


def part(rank: int, number: int) -> tuple[Tensor, Tensor]:
    x, y, *_ = tiny_batch(seed=10 * number + rank)
    return x, y


def by_hand(same_size: bool, three: bool) -> dict[str, Tensor]:
    """SGD with momentum on the mean of both processes' gradients; absent in both is no gradient."""
    model = experts(same_size)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=0.01)
    for number in range(STEPS):
        optimizer.zero_grad()
        for rank in range(2):
            model.use = branch(rank, number, three)
            x, y = part(rank, number)
            (functional.cross_entropy(model(x), y) / 2).backward()
        optimizer.step()
    return model.state_dict()


def trained(rank: int, same_size: bool, three: bool) -> dict[str, Tensor]:
    model = experts(same_size)
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, weight_decay=0.01)
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    step = fastadv.step(wrapped, optimizer, "standard", mode="eager")
    for number in range(STEPS):
        model.use = branch(rank, number, three)
        step(*part(rank, number))
    step.check()
    return model.state_dict()


def method_on_branches(rank: int, method: str, captured: bool) -> dict[str, Tensor]:
    model = experts(False)
    options = {"warmup_epochs": 0} if method == "awp" else {}
    known = {"total_steps": 4, "steps_per_epoch": 2}
    step = tiny_step(model, method, steps=2, **known, **options)
    step = capture(step) if captured else step
    for number in range(3):
        model.use = branch(rank, number, True)
        x, y = part(rank, number)
        step(x, y, torch.arange(8) + 8 * rank)
    step.check()
    return model.state_dict()


def unequal(rank: int, method: str) -> dict[str, Tensor]:
    """The last batch has 8 images here and 3 there."""
    model = tiny_model()
    late = {"te_start": 0, "te_end": 0} if method == "trades-te" else {}
    late |= {"sat_start": 0} if method == "trades-sat" else {}
    known = {"total_steps": 4, "steps_per_epoch": 2}
    step = tiny_step(model, method, **known, **late)
    for number in range(3):
        x, y = part(rank, number)
        rows = torch.arange(8) + 8 * rank
        count = 3 if number == 2 and rank == 1 else 8
        step(x[:count], y[:count], rows[:count])
    step.check()
    return model.state_dict() | {
        n: t for n, t in step.state.items() if n not in step.rank_local_state
    }


def one_bad_rank(rank: int, what: str) -> dict[str, Any]:
    """Only process 1 has a fault, in its second batch, which only the device may read."""
    from op_recorder import DeviceNetwork

    model = tiny_model()
    step = tiny_step(model, "awp", steps=1, warmup_epochs=0, total_steps=8, steps_per_epoch=8)
    step.internals.net.__class__ = DeviceNetwork
    kept: dict[str, Tensor] = {}
    for number in range(3):
        x, y = part(rank, number)
        if number == 1 and rank == 1:
            kept = copy.deepcopy(model.state_dict())
            x = x + (float("nan") if what == "image" else 0)
            y = y - (5 if what == "label" else 0)
        elif number == 1:
            kept = copy.deepcopy(model.state_dict())
        step(x, y, torch.arange(8))
    with pytest.raises(fastadv.TrainingError) as caught:
        step.check()
    same = all(torch.equal(kept[name], value) for name, value in model.state_dict().items())
    return {"said": str(caught.value), "same": same}


def sentence(function: Callable[[], Any]) -> str:
    began = time.monotonic()
    try:
        function()
    except (fastadv.UserError, fastadv.TrainingError) as error:
        assert time.monotonic() - began < 20
        return f"{type(error).__name__}: {error}"
    return "nothing"


def other_model(rank: int, what: str) -> str:
    model = experts(True)
    if what == "frozen" and rank == 1:
        model.b.weight.requires_grad_(False)
    if what == "shape" and rank == 1:
        model = experts(False)
    step = tiny_step(model, "trades" if what == "method" and rank == 1 else "pgd", steps=1)
    x, y = part(rank, 0)
    return sentence(lambda: step(x, y))


def frozen_later(rank: int) -> str:
    """A change in one process only; the other waits for its gradients."""
    own.AGREEMENT_TIMEOUT = timedelta(seconds=3)
    model = experts(True)
    step = tiny_step(model, "pgd", steps=1)
    x, y = part(rank, 0)
    step(x, y)
    if rank == 1:
        model.a.weight.requires_grad_(False)
    return sentence(lambda: step(x, y))


def empty_batch(rank: int) -> str:
    model = experts(True)
    step = tiny_step(model, "pgd", steps=1)
    x, y = part(rank, 0)
    step(x, y)
    return sentence(lambda: step(x[: 8 - 8 * rank], y[: 8 - 8 * rank]))


def late_after_an_error(rank: int) -> str:
    """Process 0 catches the error of a call and is late for the next one, where process 1 finds
    its old report."""
    assert other_model(rank, "frozen") != "nothing"
    time.sleep(0 if rank else 2.5)
    step = tiny_step(experts(True), "pgd", steps=1)
    x, y = part(rank, 0)
    return sentence(lambda: step(x, y))


def worker(rank: int, port: int, out: str, names: list[str]) -> None:
    address = f"tcp://127.0.0.1:{port}"
    distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    for name in names:
        torch.save(run(name, rank), f"{out}.{name}.{rank}")
    own.leave()


def run(name: str, rank: int) -> Any:
    function, *arguments = JOBS[name]
    torch.manual_seed(rank)
    return function(rank, *arguments)


BRANCHES = {
    f"{'same' if same else 'other'}-{'three' if three else 'two'}": (trained, same, three)
    for same in (True, False)
    for three in (False, True)
}
METHODS = {
    f"{name}{'-captured' if captured else ''}": (method_on_branches, name, captured)
    for name in ("pgd", "trades", "awp")
    for captured in (False, True)
}
UNEQUAL = {
    f"unequal-{name}": (unequal, name)
    for name in ("atta-1", "trades-te", "trades-sat", "apart", "pgd")
}
BAD = {f"bad-{what}": (one_bad_rank, what) for what in ("image", "label")}
OTHER = {f"other-model-{what}": (other_model, what) for what in ("frozen", "shape", "method")}
FAILING = {"frozen-later": (frozen_later,), "empty-batch": (empty_batch,)}
LATE = {"late": (late_after_an_error,)}
TOGETHER = BRANCHES | METHODS | UNEQUAL | BAD | OTHER | LATE
JOBS: dict[str, tuple[Any, ...]] = TOGETHER | FAILING


def results_of(names: list[str], folder: Path) -> Callable[[str], list[Any]]:
    out = str(folder / "result")
    in_two_processes(worker, free_port(), out, names)
    return lambda name: [torch.load(f"{out}.{name}.{rank}") for rank in range(2)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[Any]]:
    return results_of(list(TOGETHER), tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", BRANCHES)
def test_a_branch_of_one_process_counts_half(name: str, results: Any) -> None:
    _, same, three = BRANCHES[name]
    expected = by_hand(same, three)
    for found in results(name):
        for weight, value in expected.items():
            torch.testing.assert_close(found[weight], value, rtol=1e-12, atol=1e-12, msg=weight)


@pytest.mark.parametrize("name", [*METHODS, *UNEQUAL])
def test_processes_stay_the_same(name: str, results: Any) -> None:
    first, second = results(name)
    assert first.keys() == second.keys()
    for weight, value in first.items():
        assert torch.equal(value, second[weight]), weight


@pytest.mark.parametrize("method", ["pgd", "trades", "awp"])
def test_captured_mode_equals_eager(method: str, results: Any) -> None:
    for eager, captured in zip(results(method), results(f"{method}-captured"), strict=True):
        for weight, value in eager.items():
            torch.testing.assert_close(captured[weight], value, rtol=1e-12, atol=1e-12)


def test_a_parameter_unused_in_all_processes_does_not_decay(results: Any) -> None:
    before = experts(True).state_dict()
    for found in results("same-two"):
        assert torch.equal(found["c.weight"], before["c.weight"])


@pytest.mark.parametrize("what", ["image", "label"])
def test_a_fault_of_one_process_masks_the_update_of_all(what: str, results: Any) -> None:
    said = {"image": "Images were outside", "label": "Labels were outside"}[what]
    for found in results(f"bad-{what}"):
        assert said in found["said"]
        assert "at step 1" in found["said"]
        assert found["same"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("frozen", "b.weight is float64 [4, 8] in process 0 and float64 [4, 8], frozen in"),
        ("shape", "b.weight is float64 [4, 8] in process 0 and absent in process 1"),
        ("method", "all processes train by one method"),
    ],
)
def test_other_models_are_refused_in_every_process(what: str, said: str, results: Any) -> None:
    for found in results(f"other-model-{what}"):
        # The process that finds it first may report it before the other has looked.
        assert found.startswith(("UserError", "TrainingError: This process stops here"))
        assert said in found


def test_an_error_that_was_caught_does_not_end_the_next_call(results: Any) -> None:
    assert results("late") == ["nothing", "nothing"]


@pytest.mark.slow
def test_a_change_in_one_process_ends_both(tmp_path: Path) -> None:
    waiting, changed = results_of(["frozen-later"], tmp_path)("frozen-later")
    assert "changed in process 1 and not in process 0" in changed
    ended = "TrainingError: This process stops here because process 1 stopped (UserError"
    assert waiting.startswith(ended)


@pytest.mark.slow
def test_an_empty_batch_in_one_process_ends_both(tmp_path: Path) -> None:
    waiting, empty = results_of(["empty-batch"], tmp_path)("empty-batch")
    assert empty.startswith("UserError")
    ended = "TrainingError: This process stops here because process 1 stopped (UserError"
    assert waiting.startswith(ended)
