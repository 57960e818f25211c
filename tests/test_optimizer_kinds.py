"""``--optimizer``: every optimizer of ``torch.optim``, its options, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_run_optimizers import config, gradients
from tiny import tiny_batch, tiny_model, tiny_step
from torch import optim

from fastadv.errors import UserError
from fastadv.run.config_file import from_bytes, to_toml
from fastadv.run.optimizer_kinds import kinds, read_options
from fastadv.run.optimizers import load_state, make_optimizer
from fastadv.run.origin import Origin
from fastadv.run.resolve import resolve_stored
from fastadv.storage import checkpoint

Build = Callable[[Any], optim.Optimizer]

TORCHS: dict[str, tuple[dict[str, Any], Build]] = {
    "rmsprop": (
        {"optimizer_options": "alpha=0.9;momentum=0.8;centered=true"},
        lambda p: optim.RMSprop(p, 0.01, alpha=0.9, momentum=0.8, centered=True, weight_decay=0.1),
    ),
    "NAdam": (
        {"optimizer_options": "betas=0.8,0.99;momentum_decay=0.01", "lr": 0.02},
        lambda p: optim.NAdam(p, 0.02, betas=(0.8, 0.99), momentum_decay=0.01, weight_decay=0.1),
    ),
    "radam": ({}, lambda p: optim.RAdam(p, 0.001, weight_decay=0.1)),
    "adagrad": (
        {"optimizer_options": "lr_decay=0.1"},
        lambda p: optim.Adagrad(p, 0.01, lr_decay=0.1, weight_decay=0.1),
    ),
    "adamax": ({}, lambda p: optim.Adamax(p, 0.002, weight_decay=0.1)),
    "adadelta": ({}, lambda p: optim.Adadelta(p, 1.0, weight_decay=0.1)),
    "asgd": ({}, lambda p: optim.ASGD(p, 0.01, weight_decay=0.1)),
    "rprop": (
        {"weight_decay": None, "optimizer_options": "etas=0.4,1.1"},
        lambda p: optim.Rprop(p, 0.01, etas=(0.4, 1.1)),
    ),
    "adafactor": (
        {"optimizer_options": "d=1.5"},
        lambda p: optim.Adafactor(p, 0.01, d=1.5, weight_decay=0.1),
    ),
    "adamw": (
        {"optimizer_options": "amsgrad=True; eps=1/1000000"},
        lambda p: optim.AdamW(p, 0.001, amsgrad=True, eps=1e-6, weight_decay=0.1, fused=True),
    ),
    "SGD": (
        {"optimizer_options": "dampening=0.5", "lr": 0.1},
        lambda p: optim.SGD(p, 0.1, 0.9, dampening=0.5, weight_decay=0.1, fused=True),
    ),
}


def test_every_optimizer_of_torch_is_here() -> None:
    assert {name.lower() for name in TORCHS} | {"adam"} == set(kinds())


@pytest.mark.parametrize("name", TORCHS)
def test_updates_are_those_of_torchs(name: str) -> None:
    settings, build = TORCHS[name]
    settings = {"weight_decay": 0.1, "schedule": "constant"} | settings
    model, twin = tiny_model(), tiny_model()
    own = make_optimizer(config(optimizer=name, **settings), model)
    theirs = build(twin.parameters())
    assert type(own) is type(theirs)
    for update in range(4):
        for network, optimizer in ((model, own), (twin, theirs)):
            gradients(network, update)
            optimizer.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", [*TORCHS, "adam"])
@pytest.mark.parametrize("method", ["awp", "apart"])
def test_methods_that_move_weights_or_learn_continue_bit_for_bit(
    name: str, method: str, tmp_path: Path
) -> None:
    """Through a checkpoint file, in the middle of a run."""
    settings = {"optimizer": name, "schedule": "constant"}
    chosen = config(**settings | TORCHS.get(name, ({}, None))[0])

    def built(seed: int) -> Any:
        model = tiny_model(seed)
        optimizer = make_optimizer(chosen, model)
        return (
            model,
            optimizer,
            tiny_step(model, method, optimizer=optimizer, num_samples=20, total_steps=6),
        )

    found = []
    for cut in (False, True):
        model, optimizer, step = built(2)
        for update in range(6):
            if cut and update == 3:
                content = {"model": model.state_dict(), "step": step.state_dict()}
                checkpoint.save(tmp_path / "x.pt", content | {"optimizer": optimizer.state_dict()})
                saved = checkpoint.load(tmp_path / "x.pt")
                model, optimizer, step = built(5)
                model.load_state_dict(saved["model"])
                load_state(optimizer, saved["optimizer"])
                step.load_state_dict(saved["step"])
            x, y, index, _ = tiny_batch(seed=update)
            step(x, y, index)
        step.check()
        found.append(model.state_dict())
    start = tiny_model().state_dict()
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    assert any(not torch.equal(start[name], value) for name, value in found[0].items())


def test_a_state_from_a_gpu_keeps_how_this_device_computes() -> None:
    model = tiny_model()
    optimizer = make_optimizer(config(optimizer="nadam"), model)
    gradients(model, 0)
    optimizer.step()
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["capturable"] = True
    load_state(optimizer, state)
    assert [group["capturable"] for group in optimizer.param_groups] == [False]
    gradients(model, 1)
    optimizer.step()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"optimizer": "LBFGS"}, "lbfgs cannot train here: it evaluates the loss several times"),
        ({"optimizer": "sparseadam"}, "sparse gradients"),
        ({"optimizer": "muon"}, "two dimensions only"),
        ({"optimizer": "adamv"}, "Did you mean adam"),
        ({"optimizer": "lion"}, "Choose from: adadelta"),
        ({"optimizer": "rprop", "weight_decay": 0.1}, "rprop has no weight decay"),
        ({"optimizer_options": "betas=0.9,0.95"}, "sgd has no option 'betas'; it has dampening"),
        ({"optimizer_options": "momentum=0.5"}, "a setting of its own: --momentum 0.5"),
        ({"optimizer": "rmsprop", "optimizer_options": "weight_decay=1"}, "--weight-decay 1"),
        ({"optimizer": "adam", "optimizer_options": "fused=false"}, "chosen by fastadv"),
        ({"optimizer": "adam", "optimizer_options": "betas=0.9"}, "takes 2 numbers"),
        ({"optimizer": "adam", "optimizer_options": "betas=0.9,2"}, "refuses its options: Invalid"),
        ({"optimizer": "adam", "optimizer_options": "eps=small"}, "must be a number"),
        ({"optimizer": "adam", "optimizer_options": "amsgrad=2"}, "must be true or false"),
        ({"optimizer": "adam", "optimizer_options": "eps=1;eps=2"}, "each name once"),
        ({"optimizer": "adam", "optimizer_options": "eps"}, "name=value, separated by semicolons"),
    ],
)
def test_what_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as found:
        config(**settings)
    assert "\n" not in str(found.value)


def test_the_values_of_a_run_with_another_optimizer() -> None:
    chosen = config(optimizer="RMSprop", optimizer_options="alpha=0.9")
    assert (chosen.optimizer, chosen.lr, chosen.origins["lr"]) == ("rmsprop", 0.01, Origin.DEFAULT)
    assert chosen.momentum == 0.0
    stored = resolve_stored(from_bytes(to_toml(chosen).encode(), Path("config.toml")))
    assert to_toml(stored) == to_toml(chosen)
    assert config(optimizer="rprop").weight_decay == 0.0
    assert read_options("adam", "betas = 0.9, 0.5") == {"betas": (0.9, 0.5)}
