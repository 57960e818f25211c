"""After a fault the weights, buffers, optimizer and stored state stay the last good ones."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from every_recipe import call, step_of
from test_transaction import assert_equal
from tiny_capture import DeviceNetwork
from tiny_staged import SAMPLES, staged_model
from torch import Tensor, nn

import fastadv
from fastadv import TrainingError, UserError
from fastadv.training.training_step import Step


def learned(step: Step) -> dict[str, Any]:
    """The faults of training so far."""
    found = {
        "model": step.model.state_dict(),
        "optimizer": step.optimizer.state_dict()["state"],
        # Clocks of the host go on.
        "state": {k: v for k, v in step.state.items() if k != "resets"},
    }
    return copy.deepcopy(found)


def all_finite(found: Any) -> bool:
    if isinstance(found, Tensor):
        return not found.is_floating_point() or bool(found.isfinite().all())
    if isinstance(found, dict):
        return all(map(all_finite, found.values()))
    return all(map(all_finite, found)) if isinstance(found, (list, tuple)) else True


METHODS = {
    "pgd": {"averaging": "ema"},
    "swa": {"average_start": 1},
    "atta-3": {},
    "te": {"te_start": 0, "te_end": 0},
    "apart": {},
    "free": {},
    "trades-awp": {},
    "trades-sat": {"sat_start": 0},
    "rwp": {},
}


@pytest.mark.parametrize("device", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nothing_moves_after_an_image_that_is_not_finite(
    method: str, bad: float, device: bool
) -> None:
    """``device``: where Python must not read values, each update masks itself."""
    step = step_of(method, staged_model(), epoch_length=2, **METHODS[method])
    if device:
        step.internals.net.__class__ = DeviceNetwork
    for update in range(3):
        call(step, update)
    before = learned(step)
    x, y, index = batch(7)
    x[0, 0, 0, 0] = bad
    step(x, y, index)
    for update in range(4, 8):  # epochs end, averages and resets are due
        call(step, update)
    assert_equal(before, learned(step))
    assert all_finite(before)
    assert not step.healthy()
    with pytest.raises(TrainingError, match="nothing was updated"):
        step.check()


def batch(update: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(update)
    x = torch.rand(6, 3, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 4, (6,), generator=generator)
    return x, y, torch.randperm(SAMPLES, generator=generator)[:6]


class Net(nn.Module):
    """float32, BatchNorm, an inner convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(torch.relu(self.bn1(self.conv1(x))))
        return self.linear(torch.tanh(x).mean((2, 3)))


def small(optimizer: Any, method: str = "fgsm", device: bool = False, **options: Any) -> Step:
    torch.manual_seed(0)
    model = Net()
    step = fastadv.step(model, optimizer(model.parameters()), method, mode="eager", **options)
    if device:
        step.internals.net.__class__ = DeviceNetwork
    return step


def call_small(step: Step, update: int) -> None:
    x, y, index = batch(update)
    step(x.float(), y, index)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_update_that_overflows_is_undone(kind: str, first: bool) -> None:
    """A finite loss and gradient; the rate is too large for the weights' type, the first update of
    an optimizer or a later one."""
    step = small(OPTIMIZERS[kind], averaging="ema")
    if not first:
        call_small(step, 0)
    before = learned(step)
    group = step.optimizer.param_groups[0]
    group["lr"], group["weight_decay"] = 1e37, 1e5
    flagged = 0
    for update in range(1, 5):
        healthy = step.healthy()
        call_small(step, update)
        if step.healthy():
            before = learned(step)
        elif healthy:
            flagged = update
    found = learned(step)
    assert flagged
    assert all_finite(found)
    if first and flagged == 1:
        assert all("momentum_buffer" not in own for own in found["optimizer"].values())
        del before["state"], found["state"]  # allocated by the first call
    assert_equal(before, found)
    if kind in {"sgd", "nesterov", "foreach", "fused", "adamw"}:
        assert flagged == 1
        with pytest.raises(TrainingError, match="overflowed"):
            step.check()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.RMSprop, torch.optim.Adagrad])
def test_an_optimizer_state_that_overflows_is_undone_though_the_weights_are_finite(
    kind: Any, first: bool
) -> None:
    """The decay enters a square: g/sqrt(inf) moves no weight, nor will any later update."""
    step = small(lambda p: kind(p, lr=1e-3))
    if not first:
        call_small(step, 0)
    before = learned(step)
    step.optimizer.param_groups[0]["weight_decay"] = 1e30
    call_small(step, 1)
    assert not step.healthy()
    assert all_finite(learned(step))
    assert_equal(before, learned(step))
    with pytest.raises(TrainingError, match="overflowed"):
        step.check()


@pytest.mark.parametrize("device", [False, True])
def test_a_flag_before_the_first_average_leaves_the_live_weights_to_be_evaluated(
    device: bool,
) -> None:
    step = step_of("swa", staged_model(), epoch_length=2, average_start=1)
    if device:
        step.internals.net.__class__ = DeviceNetwork
    call(step, 0)
    x, y, index = batch(7)
    x[0, 0, 0, 0] = float("nan")
    step(x, y, index)
    for update in range(2, 6):  # epochs 1 and 2 end
        call(step, update)
    live = copy.deepcopy(step.model.state_dict())
    with step.evaluation_weights():
        assert_equal(live, copy.deepcopy(step.model.state_dict()))


def setting(draw: random.Random) -> dict[str, Any]:
    """One of many settings with which training is hardly possible."""
    size = lambda: draw.choice([0.1, 1.0, 1e5, 1e20, 1e30, 3e38])  # noqa: E731
    methods = ["fgsm", "pgd", "awp", "rwp", "trades-awp", "apart", "atta-1", "free"]
    return {
        "method": draw.choice(methods),
        "lr": size() * draw.choice([1.0, 1e-3]),
        "momentum": draw.choice([0.0, 0.9, 0.999, 5.0, 1e10]),
        "weight_decay": draw.choice([0.0, 5e-4, 1.0, 1e10, 1e38]),
        "gamma": draw.choice([0.01, 1.0, 1e10, 1e30]),
        "scale": draw.choice([1.0, 1e10, 1e18, 1e30]),
        "averaging": draw.choice(["none", "ema", "swa"]),
    }


@pytest.mark.parametrize(
    "seeds", [range(25), pytest.param(range(25, 400), marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_settings_that_cannot_train_leave_the_last_good_weights(seeds: range) -> None:
    flagged = 0
    for seed in seeds:
        chosen = setting(random.Random(seed))
        try:
            step = extreme(chosen)
        except UserError:
            continue
        good = learned(step)
        for update in range(6):
            try:
                call_small(step, update)
            except (TrainingError, UserError):
                break
            now = learned(step)
            if not step.healthy():
                assert_equal(good, now, f"{seed}: {chosen}")
            assert all_finite(now["model"]), (seed, chosen)
            assert all_finite(now["state"]), (seed, chosen)
            good = now
        flagged += not step.healthy()
    assert flagged > len(seeds) // 4


def extreme(chosen: dict[str, Any]) -> Step:
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.linear.weight *= chosen["scale"]
    names = ("lr", "momentum", "weight_decay")
    optimizer = torch.optim.SGD(model.parameters(), **{name: chosen[name] for name in names})
    options: dict[str, Any] = {"averaging": chosen["averaging"], "blocks": None}
    if chosen["method"] in {"pgd", "awp", "rwp", "trades-awp"}:
        options["steps"] = 2
    if "wp" in chosen["method"]:
        options["gamma"] = chosen["gamma"]
    if chosen["method"] == "trades-awp":
        options["warmup_epochs"] = 0
    if chosen["method"] == "apart":
        options["blocks"] = ["conv2"]
    return fastadv.step(
        model, optimizer, chosen["method"], mode="eager", num_samples=SAMPLES,
        total_steps=8, steps_per_epoch=2, **options,
    )  # fmt: skip
