"""The optimizers of a run: their updates, what decays, and that a run with them is exact."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import one_thread, same
from tiny import tiny_batch, tiny_model
from tiny_capture import Replayer
from torch import Tensor, nn
from torch.nn import functional

import fastadv
from fastadv.engine.optimizer import replayed
from fastadv.engine.optimizer.optimizer_copy import OptimizerCopy
from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.optimizers import make_optimizer
from fastadv.run.origin import Origin
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.session import Session
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint
from fastadv.training.captured import CapturedUpdate
from fastadv.training.training_step import Step


def config(**settings: Any) -> Any:
    return resolve_run(RunRequest(**{"method": "pgd", "data": "digits"} | settings))


def gradients(model: nn.Module, update: int) -> None:
    x, y, _, _ = tiny_batch(seed=update)
    model.zero_grad()
    functional.cross_entropy(model(x), y).backward()


def adam_by_hand(model: nn.Module, updates: int, lr: float, decay: float, *, apart: bool) -> None:
    """Kingma and Ba 2015, Alg. 1, with L2 decay, or decay apart from it (Loshchilov, Hutter 2019,
    Alg. 2)."""
    first = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    second = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for t in range(1, updates + 1):
        gradients(model, t)
        with torch.no_grad():
            for name, p in model.named_parameters():
                g = p.grad if apart else p.grad + decay * p
                before = p.clone()
                first[name] = 0.9 * first[name] + 0.1 * g
                second[name] = 0.999 * second[name] + 0.001 * g * g
                m, v = first[name] / (1 - 0.9**t), second[name] / (1 - 0.999**t)
                p -= lr * m / (v.sqrt() + 1e-8)
                if apart:
                    p -= lr * decay * before


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_is_the_published_algorithm(kind: str) -> None:
    model, twin = tiny_model(), tiny_model()
    optimizer = make_optimizer(config(optimizer=kind, lr=0.01, weight_decay=0.1), model)
    for update in range(1, 6):
        gradients(model, update)
        optimizer.step()
    adam_by_hand(twin, 5, 0.01, 0.1, apart=kind == "adamw")
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-10, atol=1e-12)


def test_sgd_is_built_as_it_always_was() -> None:
    model = tiny_model()
    optimizer = make_optimizer(config(lr=0.2, momentum=0.8, nesterov=True), model)
    plain = torch.optim.SGD(
        model.parameters(), lr=0.2, momentum=0.8, weight_decay=5e-4, nesterov=True, fused=True
    )
    assert type(optimizer) is torch.optim.SGD
    assert [dict(group) for group in optimizer.param_groups] == plain.param_groups


def test_affine_parameters_of_norms_keep_their_size_without_decay() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    settings = {"lr": 0.5, "weight_decay": 0.1, "momentum": 0.0, "cycle_momentum": False}
    optimizer = make_optimizer(config(decay_norms=False, **settings), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        left = before[name] if name.startswith("bn") else 0.95 * before[name]
        torch.testing.assert_close(parameter.detach(), left, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("method", "mark"), [("rat-lr", "fixed_rate"), ("at-fix-param-k", "frozen")]
)
def test_norms_of_layers_that_are_treated_apart(method: str, mark: str) -> None:
    """Each group of the layers part is divided; the step accepts the groups."""
    chosen = config(
        method=method, decay_norms=False, width=2, options={"layer_groups": ("3", "4"), "steps": 1}
    )
    model = fastadv.build_model("preact_resnet18", width=2, in_channels=1)
    optimizer = make_optimizer(chosen, model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in optimizer.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    for group, inside in zip(optimizer.param_groups, groups, strict=True):
        norms = {"bn" in name for name in inside}
        apart = {name.startswith(("layer3", "layer4")) for name in inside}
        assert (len(norms), apart) == (1, {group.get(mark) is not None})
        decays = norms == {False} and (apart == {False} or mark != "frozen")
        assert group["weight_decay"] == (chosen.weight_decay if decays else 0)
    assert len(groups) == 4
    Session.build(chosen)  # binds the layers part to such an optimizer


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"momentum": 0.9}, "--momentum is for --optimizer sgd; omit it with adam"),
        ({"nesterov": True}, "--nesterov is for --optimizer sgd"),
        ({"cycle_momentum": True}, "--cycle-momentum is for --optimizer sgd"),
    ],
)
def test_what_is_of_sgd_alone_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        config(optimizer="adam", **settings)


def test_the_values_of_a_run_with_adam() -> None:
    chosen = config(optimizer="adam", method="rst", data="cifar10")  # has a Nesterov momentum
    assert (chosen.momentum, chosen.nesterov, chosen.cycle_momentum) == (0.0, False, False)
    assert (chosen.lr, chosen.origins["lr"]) == (1e-3, Origin.DEFAULT)
    assert chosen.weight_decay == config(method="rst", data="cifar10").weight_decay
    assert config(optimizer="adamw", lr=0.1).lr == 0.1
    assert config(optimizer="sgd").momentum == 0.9


SMALL = {
    "method": "fast",
    "width": 4,
    "epochs": 2,
    "limit": 160,
    "batch_size": 32,
    "test_limit": 32,
    "mode": "eager",
    "select_attack": "fgsm",
    "test_attacks": "clean",
    "eps_warmup": 1.0,
    "max_grad_norm": 0.5,
    "decay_norms": False,
    "checkpoint_minutes": 0.0,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adam", "schedule": "one-cycle", "averaging": "ema"},
        pytest.param(
            {"optimizer": "adamw", "schedule": "cosine-epoch", "weight_decay": 0.05},
            marks=pytest.mark.slow,
        ),
        pytest.param({"schedule": "one-cycle", "momentum": 0.95}, marks=pytest.mark.slow),
        pytest.param({"points": "0@0,0.1@1,0@2"}, marks=pytest.mark.slow),
        pytest.param(
            {
                "optimizer": "nadam",
                "optimizer_options": "betas=0.8,0.99;decoupled_weight_decay=true",
                "schedule": "exponential",
                "warmup": 1.5,
            },
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"schedule": "multistep", "drops": (0.3, 0.6), "drop_factors": (0.1, 0.5)},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_that_was_cut_off_is_resumed_bit_for_bit(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {name: settings[name] for name in ("averaging",) if name in settings}
    more = {name: value for name, value in settings.items() if name not in options}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    step = Step.__call__

    def fail_at_the_seventh(self: Step, *inputs: Any, **kwargs: Any) -> Any:
        if self.calls == 6:
            raise RuntimeError("power cut")
        return step(self, *inputs, **kwargs)

    with one_thread():
        request = {**SMALL, **more, "options": options}
        train(RunRequest(**request, out=str(whole)), Console())
        monkeypatch.setattr(Step, "__call__", fail_at_the_seventh)
        with pytest.raises(RuntimeError, match="power cut"):
            train(RunRequest(**request, out=str(cut)), Console())
        monkeypatch.undo()
        progress = checkpoint.load(cut / "last.pt")["progress"]
        assert (progress["epoch"], progress["batch"]) == (1, 1)
        resume(str(cut), Console())
    same(cut, whole)


class Unmoved(Replayer):
    """Records as CUDA does, which runs nothing: an update that is recorded moves no weights yet."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.copy, self.updates = OptimizerCopy(optimizer), 0

    def __call__(
        self, function: Callable[[], Any], *, alone: bool = False
    ) -> tuple[Any, Callable[[], None]]:
        self.copy.take()
        recorded = super().__call__(function, alone=alone)
        self.copy.put_back()
        self.updates += alone
        return recorded


@pytest.mark.parametrize("kind", ["sgd", "adam", "adamw"])
def test_replayed_updates_equal_eager_ones(kind: str) -> None:
    """Bit for bit: these rates are the same in float32, which a graph reads."""
    rates = {
        "lr": 2**-10,
        "schedule": "multistep",
        "drops": (0.3, 0.6),
        "drop_factors": (0.5, 0.25),
    }
    # The norm of the gradients, for clipping, is summed in an order of their addresses.
    settings = SMALL | {"optimizer": kind, "epochs": 4, "max_grad_norm": None} | rates
    found: list[dict[str, Tensor]] = []
    for captured in (False, True):
        session = Session.build(config(**settings))
        internals = session.step.internals
        if captured:
            internals.passes = CapturedUpdate(internals.update, Unmoved(session.optimizer))
        for epoch in range(4):
            for batch in session.data.loader.epoch(epoch):
                session.step(batch.image, batch.label, batch.index, view=batch.view)
        session.step.check()
        if captured:
            assert internals.passes.recorded == 2  # the last batch is short
            assert internals.passes.recorder.updates == 2
        state = {
            f"{place}.{name}": value
            for place, values in enumerate(session.optimizer.state.values())
            for name, value in values.items()
        }
        assert state
        assert all(math.isfinite(value.double().sum()) for value in state.values())
        found.append(dict(session.model.state_dict()) | state)
    eager, replayed = found
    for name, value in eager.items():
        assert torch.equal(replayed[name], value), name


def test_a_momentum_by_the_epoch_is_recorded_in_every_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one-cycle changes it: a recording that was replayed often enough is not counted."""
    monkeypatch.setattr(replayed, "PAYS_OFF", 2)
    settings = SMALL | {"schedule": "one-cycle", "epochs": 14, "limit": 128, "max_grad_norm": None}
    session = Session.build(config(**settings))
    internals = session.step.internals
    internals.passes = CapturedUpdate(internals.update, Unmoved(session.optimizer))
    momenta = set()
    for epoch in range(14):
        for batch in session.data.loader.epoch(epoch):
            session.step(batch.image, batch.label, batch.index, view=batch.view)
            momenta.add(session.optimizer.param_groups[0]["momentum"])
    session.step.check()
    assert len(momenta) > replayed.MAX_RERECORDINGS + 2
    assert internals.passes.recorder.updates >= len(momenta) - 1
