"""Layers with a fixed learning rate or frozen, and the optimizer groups that they need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import LEARNING, assert_same, climb, tiny_batch, tiny_model, twin
from tiny_staged import StagedNet, staged_model, staged_step, weights_of
from torch import nn
from torch.nn import functional

import fastadv
from fastadv import param_groups
from fastadv.errors import UserError
from fastadv.run.config_file import from_bytes
from fastadv.run.resolve import resolve_stored
from fastadv.run.schedules import Schedule

ATTACK: dict[str, Any] = {"steps": 2, "alpha": 0.04}


def of_stages(model: nn.Module, *stages: str) -> dict[str, nn.Parameter]:
    return {n: p for n, p in model.named_parameters() if n.startswith(stages)}


def by_hand(
    model: StagedNet, optimizer: torch.optim.Optimizer, rates: list[list[float]], frozen: tuple = ()
) -> None:
    """Three PGD steps, ``rates[update][group]`` the learning rates."""
    x, y, _, start = tiny_batch()
    for row in rates:
        for group, rate in zip(optimizer.param_groups, row, strict=True):
            group["lr"] = rate
        x_adv = climb(model, x, start, lambda z: functional.cross_entropy(z, y), 0.04, 2, "train")
        optimizer.zero_grad()
        functional.cross_entropy(model(x_adv), y).backward()
        for parameter in of_stages(model, *frozen).values() if frozen else ():
            parameter.grad = None
        optimizer.step()


def falling_step(model: nn.Module, method: str, **options: Any) -> fastadv.Step:
    """The scheduled groups' rate falls tenfold at each update."""

    def schedule(update: int) -> None:
        for group in step.optimizer.param_groups:
            group["lr"] = 0.05 * 0.1**update  # every group, as a torch scheduler would

    step = staged_step(model, method, before_update=schedule, **options)
    return step


def three_steps(step: fastadv.Step) -> None:
    x, y, index, start = tiny_batch()
    for _ in range(3):
        step(x, y, index % 12, start=start)


def two_groups(model: nn.Module, *stages: str) -> torch.optim.SGD:
    chosen = of_stages(model, *stages)
    rest = [p for n, p in model.named_parameters() if n not in chosen]
    return torch.optim.SGD([{"params": rest}, {"params": list(chosen.values())}], **LEARNING)


@pytest.mark.parametrize(
    ("method", "options", "stages"),
    [
        ("rat-lr", {}, ("layer3", "layer4")),
        ("at-fix-lr-k", {"layer_groups": "1,4"}, ("layer1", "layer4")),
        ("at-fix-lr-k", {"layer_groups": (2,), "fixed_lr": 0.02}, ("layer2",)),
    ],
)
def test_fixed_rate_under_any_scheduler(
    method: str, options: dict[str, Any], stages: tuple[str, ...]
) -> None:
    model = staged_model()
    reference = twin(model)
    step = falling_step(model, method, **ATTACK, **options)
    three_steps(step)
    rate = options.get("fixed_lr", 0.05)
    rates = [[0.05 * 0.1**update, rate] for update in range(3)]
    by_hand(reference, two_groups(reference, *stages), rates)
    assert_same(model, reference)


def test_our_schedule_leaves_the_fixed_group_alone() -> None:
    model = staged_model()
    optimizer = torch.optim.SGD(fastadv.param_groups(model, "rat-lr", lr=0.05), momentum=0.9)
    schedule = Schedule(optimizer, "piecewise", 8, cycle_momentum=False)
    schedule(7)
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.0005), 0.05]


def test_scaled_gradients_are_eq_4() -> None:
    """eta multiplies the gradient only: not weight decay, and inside the momentum buffer."""
    model = staged_model()
    reference = twin(model)
    optimizer = torch.optim.SGD(model.parameters(), **LEARNING)
    step = falling_step(model, "rat-lr", optimizer=optimizer, rate_form="gradient", **ATTACK)
    three_steps(step)
    x, y, _, start = tiny_batch()
    optimizer = torch.optim.SGD(reference.parameters(), **LEARNING)
    for update in range(3):
        optimizer.param_groups[0]["lr"] = 0.05 * 0.1**update
        x_adv = climb(
            reference, x, start, lambda z: functional.cross_entropy(z, y), 0.04, 2, "train"
        )
        optimizer.zero_grad()
        functional.cross_entropy(reference(x_adv), y).backward()
        for parameter in of_stages(reference, "layer3", "layer4").values():
            assert parameter.grad is not None
            parameter.grad *= 10.0**update
        optimizer.step()
    assert_same(model, reference)


def test_the_two_forms_agree_until_the_rate_falls() -> None:
    models = [staged_model(), staged_model()]
    plain = torch.optim.SGD(models[1].parameters(), **LEARNING)
    three_steps(staged_step(models[0], "rat-lr", **ATTACK))
    three_steps(staged_step(models[1], "rat-lr", optimizer=plain, rate_form="gradient", **ATTACK))
    assert_same(*models, tolerance=0)


def test_frozen_layers_keep_their_weights_and_update_their_statistics() -> None:
    model = staged_model()
    reference, before = twin(model), weights_of(model)
    step = staged_step(model, "at-fix-param-k", layer_groups="2,4", **ATTACK)
    three_steps(step)
    optimizer = torch.optim.SGD(reference.parameters(), **LEARNING)
    by_hand(reference, optimizer, [[0.05]] * 3, frozen=("layer2", "layer4"))
    assert_same(model, reference)
    frozen = of_stages(model, "layer2", "layer4")
    assert all(torch.equal(p.detach(), before[n]) for n, p in frozen.items())
    assert all(p.grad is None and p.requires_grad for p in frozen.values())
    assert not any(p in step.optimizer.state for p in frozen.values())
    statistics = model.layer2[0].bn1.running_mean
    assert not torch.equal(statistics, before["layer2.0.bn1.running_mean"])


def test_frozen_layers_under_awp_keep_their_weights_bit_for_bit() -> None:
    model = staged_model()
    before = weights_of(model)
    three_steps(staged_step(model, "at-fix-param-k", weights="awp", layer_groups="3", **ATTACK))
    for name, parameter in of_stages(model, "layer3").items():
        assert torch.equal(parameter.detach(), before[name]), name
    assert not torch.equal(model.layer2[0].conv1.weight, before["layer2.0.conv1.weight"])


MODELS = (
    *("preact_resnet18", "wide_resnet34_10", "wide_resnet34_1", "vgg16", "dla", "resnet50"),
    "densenet121",
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layers", ["uniform", "rat-lr", "fixed-lr", "frozen"])
def test_groups_cover_every_parameter_once(name: str, layers: str) -> None:
    with torch.device("meta"):
        model = fastadv.build_model(name)
    split = "quarters" if name.startswith("wide") else "stages"
    last = None if layers in ("uniform", "rat-lr") else [4]
    groups = fastadv.param_groups(model, layers, lr=0.1, groups=last, split=split)
    found = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(id(parameter) for parameter in model.parameters())
    assert len(set(found)) == len(found)
    assert len(groups) == (1 if layers == "uniform" else 2)


def test_the_step_verifies_the_optimizer() -> None:
    sentence = r"fastadv.param_groups\(model, layers='rat-lr', lr=..., groups='3,4'\)"
    for groups in (None, "3", "2,3,4"):
        model = staged_model()
        params: Any = model.parameters()
        if groups is not None:
            params = fastadv.param_groups(model, "fixed-lr", groups=groups)
        with pytest.raises(UserError, match=sentence):
            staged_step(model, "rat-lr", optimizer=torch.optim.SGD(params, lr=0.1))
    model = staged_model()
    other = torch.optim.SGD(fastadv.param_groups(staged_model(), "rat-lr"), lr=0.1)
    with pytest.raises(UserError, match=sentence):
        staged_step(model, "rat-lr", optimizer=other)  # another model's parameters
    with pytest.raises(UserError, match="layers='frozen'"):
        staged_step(model, "at-fix-param-k", optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    marked = torch.optim.SGD(fastadv.param_groups(model, "rat-lr"), lr=0.1)
    with pytest.raises(UserError, match="rat-lr"):
        staged_step(model, "rat-lr", optimizer=marked, rate_form="gradient")


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_scaled_gradients_do_not_hold_a_rate_of_adam(kind: Any) -> None:
    model = staged_model()
    with pytest.raises(UserError, match="rate_form='group'"):
        staged_step(model, "rat-lr", optimizer=kind(model.parameters(), 1e-3), rate_form="gradient")
    groups = fastadv.param_groups(model, "rat-lr", lr=1e-3)
    staged_step(model, "rat-lr", optimizer=kind(groups, 1e-3))


def test_a_selection_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UserError, match="layer group '5'"):
        fastadv.param_groups(staged_model(), "fixed-lr", groups="4,5")
    with pytest.raises(UserError, match="layer_groups="):
        fastadv.param_groups(staged_model(), "frozen")
    with pytest.raises(UserError, match="takes no groups"):
        fastadv.param_groups(staged_model(), "uniform", groups="3")
    with pytest.raises(UserError, match="residual stages"):
        fastadv.param_groups(tiny_model(), "rat-lr")
    with pytest.raises(UserError, match="Unknown layers"):
        fastadv.param_groups(staged_model(), "rat_lr")


def test_freezing_everything_is_an_error() -> None:
    with pytest.raises(UserError, match="nothing to train"):
        staged_step(staged_model(), "at-fix-param-k", layer_groups="1,2,3,4,rest")


def test_a_saved_optimizer_keeps_its_fixed_rate() -> None:
    model = staged_model()
    step = falling_step(model, "rat-lr", **ATTACK)
    three_steps(step)
    resumed = staged_step(twin(model), "rat-lr", **ATTACK)
    optimizer = resumed.optimizer
    optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    assert optimizer.param_groups[1]["fixed_rate"] == 0.05
    assert optimizer.param_groups[1]["lr"] == 0.05


def test_chosen_layers_from_the_command_line_to_the_resumed_run(
    fastadv_command: Callable[..., Any],
) -> None:
    short = ("--epochs", 1, "--limit", 100, "--width", 2, "--steps", 1, "--out", "run")
    done = fastadv_command("train", "--method", "at-fix-param-k", "--layer-groups", "1,3", *short)
    assert done.code == 0, done.err
    path = Path("run/config.toml")
    config = resolve_stored(from_bytes(path.read_bytes(), path))
    assert config.plan.layers.layer_groups == ("1", "3")


def test_a_scheduler_made_before_the_step_does_not_lower_the_fixed_rate() -> None:
    """torch's schedulers set ``lr`` when they are made and note in ``initial_lr`` what it was."""
    model = staged_model()
    optimizer = torch.optim.SGD(model.parameters(), **LEARNING)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.1)
    step = staged_step(model, "rat-lr", optimizer=optimizer, rate_form="gradient")
    assert optimizer.param_groups[0]["lr"] < LEARNING["lr"]
    assert step.plan.layers.rates == [LEARNING["lr"]]


def test_a_rate_that_is_a_tensor_is_filled_in_place() -> None:
    """A captured or compiled optimizer reads that tensor, not one that replaces it."""
    model = staged_model()
    groups = param_groups(model, "rat-lr", lr=0.05)
    rate = torch.tensor(0.05, dtype=torch.float64)
    for group in groups:
        group["lr"] = rate.clone()
    optimizer = torch.optim.SGD(groups, lr=0.05)
    step = staged_step(model, "rat-lr", optimizer=optimizer)
    own = [group["lr"] for group in optimizer.param_groups]
    for lr in own:
        lr.fill_(0.001)
    step.plan.layers.before_update(optimizer, [], [])
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, own, strict=True))
    assert [float(lr) for lr in own] == [0.001, 0.05]


@pytest.mark.parametrize("tensor", [False, True])
def test_at_a_learning_rate_of_0_no_gradient_accumulates_in_the_momentum(tensor: bool) -> None:
    x, y, index, start = tiny_batch()
    model = staged_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = staged_step(model, "rat-lr", optimizer=optimizer, rate_form="gradient", steps=1)
    optimizer.param_groups[0]["lr"] = torch.zeros(()) if tensor else 0.0
    step(x, y, index % 12, start=start)
    kept = optimizer.state[model.layer4[0].conv1.weight]["momentum_buffer"]
    assert not kept.any()
    assert optimizer.state[model.layer1[0].conv1.weight]["momentum_buffer"].any()
