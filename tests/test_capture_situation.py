"""What a recording has fixed: a change of any of it is recorded, and a step with recordings stays
equal to an eager one bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from op_recorder import graphed
from tiny import tiny_batch, tiny_model, tiny_step
from tiny_staged import view_of
from torch import Tensor, nn

from fastadv.engine.model.precision import tf32
from fastadv.threat import Threat
from fastadv.training.captured import MAX_RECORDINGS
from fastadv.training.situation import situation
from fastadv.training.training_step import Step

COUNT = 6
Call = Callable[[Step], Tensor]


def train(step: Step, count: int = COUNT, **more: Any) -> Tensor:
    x, y, index, _ = tiny_batch(count)
    x = x.to(next(step.model.parameters()).dtype)
    return step(x, y, index, **more)["loss"]


def images_like_a_start() -> Tensor:
    """Not zero, in the ball, and in the range of images: a ``start`` and a ``second``."""
    return 0.05 * tiny_batch(COUNT, seed=5)[0]


# -- a run with a change ---------------------------------------------------------------------------


def of_radius(eps: float) -> Call:
    def call(step: Step) -> Tensor:
        step.threat = Threat("linf", eps)
        return train(step)

    return call


def in_autocast(step: Step) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return train(step)


def with_a_longer_delta(step: Step) -> Tensor:
    """A state is loaded that has more rows than this run has seen."""
    other = tiny_step(tiny_model(), "free", replays=2)
    train(other, COUNT + 2)
    step.load_state_dict(other.state_dict())
    return train(step)


def trained_as(flag: bool) -> Call:
    def call(step: Step) -> Tensor:
        step.model.bn1.train(flag)
        return train(step)

    return call


def learning(flag: bool) -> Call:
    def call(step: Step) -> Tensor:
        step.model.conv2.weight.requires_grad_(flag)
        return train(step)

    return call


PGD: dict[str, Any] = {"method": "pgd", "steps": 2}
EVAL: dict[str, Any] = PGD | {"attack_bn": "eval"}
EPOCHS: dict[str, Any] = {"total_steps": 8, "steps_per_epoch": 2}
AWP: dict[str, Any] = {"method": "awp", "steps": 2, "warmup_epochs": 1} | EPOCHS
# what changes -> (the step, a call before the change, a call after it)
CHANGES: dict[str, tuple[dict[str, Any], Call, Call]] = {
    "the shape": (PGD, train, lambda step: train(step, COUNT - 2)),
    "a start": (PGD, train, lambda step: train(step, start=images_like_a_start())),
    "a view": (PGD, train, lambda step: train(step, view=view_of(COUNT))),
    "a second view": (PGD, train, lambda step: train(step, second=images_like_a_start())),
    "a second view in place of a start": (
        PGD,
        lambda step: train(step, start=images_like_a_start()),
        lambda step: train(step, second=images_like_a_start()),
    ),
    "an active part": (AWP, train, train),
    "the memory of a state": ({"method": "free", "replays": 2}, train, with_a_longer_delta),
    "requires_grad": (PGD, learning(True), learning(False)),
    "a train flag": (PGD, trained_as(True), trained_as(False)),
    "the threat": (PGD, of_radius(0.1), of_radius(0.05)),
    "the caller's autocast": (PGD | {"dtype": torch.float32}, train, in_autocast),
}


def step_of(options: dict[str, Any]) -> Step:
    options = dict(options)
    model = tiny_model().to(options.pop("dtype", torch.float64))
    return tiny_step(model, options.pop("method"), **options)


def assert_equal(step: Step, eager: Step) -> None:
    for name, value in eager.model.state_dict().items():
        assert torch.equal(step.model.state_dict()[name], value), name
    for name, value in eager.state.items():
        assert torch.equal(step.state[name], value), name


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_recorded_once(change: str) -> None:
    """Each situation is also replayed, the first one again after the second."""
    options, before, after = CHANGES[change]
    eager, step = step_of(options), graphed(step_of(options))
    for call, recorded in [(before, 1), (before, 1), (after, 2), (after, 2), (before, 2)]:
        assert torch.equal(call(step), call(eager))
        assert step.internals.passes.recorded == recorded
    assert_equal(step, eager)


def test_a_model_that_was_probed_again_is_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a first call that failed, only the number of probes is another."""

    def fail() -> None:
        raise KeyboardInterrupt

    eager, step = step_of(EVAL), graphed(step_of(EVAL))
    for each in (eager, step):
        with monkeypatch.context() as patched:
            patched.setattr(each.optimizer, "step", fail)
            with pytest.raises(KeyboardInterrupt):
                train(each)
    assert step.internals.passes.recorded == 1
    for _ in range(2):
        assert torch.equal(train(step), train(eager))
    assert step.internals.passes.recorded == 2
    assert_equal(step, eager)


def test_the_least_recently_used_recording_is_dropped() -> None:
    eager, step = step_of(PGD), graphed(step_of(PGD))
    sizes = list(range(2, 2 + MAX_RECORDINGS))
    used_again, dropped = sizes[0], sizes[1]
    calls = [*((size, 1) for size in sizes), (used_again, 0), (sizes[-1] + 1, 1)]
    calls += [(used_again, 0), (dropped, 1)]
    recorded = 0
    for size, new in calls:
        assert torch.equal(train(step, size), train(eager, size))
        recorded += new
        assert step.internals.passes.recorded == recorded, size
        assert len(step.internals.passes._entries) <= MAX_RECORDINGS
    assert_equal(step, eager)


# -- the key alone ---------------------------------------------------------------------------------


@contextmanager
def another(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def set_to(setter: Callable[[Any], Any], value: Any, before: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(before)


def moved(tensor: Tensor) -> Any:
    return another(tensor, "data", tensor.data.clone())


def nothing(*_: Any) -> None:
    pass


CUDNN: Any = torch.backends.cudnn
modules = nn.modules.module
# name -> a context in which only this is another
KEYS: dict[str, Callable[[Step], Any]] = {
    "outer_dtype": lambda step: another(step.internals.net, "outer_dtype", torch.bfloat16),
    "attack_dtype": lambda step: another(step.internals.net, "attack_dtype", torch.bfloat16),
    "looks": lambda step: another(step.internals.net, "looks", 9),
    "room": lambda step: another(step.internals.update, "room", 9),
    "version": lambda step: another(step.internals.net.structure, "version", 9),
    "parameter": lambda step: moved(step.model.conv2.weight),
    "buffer": lambda step: moved(step.model.bn2.running_var),
    "requires_grad": lambda step: another(step.model.conv2.weight, "requires_grad", False),
    "train flag": lambda step: another(step.model.bn2, "training", False),
    "active": lambda step: another(step.plan.weights, "active", False),
    "state": lambda step: moved(step.state["perturbations"]),
    "hook on a parameter": lambda step: step.model.conv1.weight.register_hook(nothing),
    "hook after a gradient": (
        lambda step: step.model.conv1.weight.register_post_accumulate_grad_hook(nothing)
    ),
    "hook on all modules": lambda step: modules.register_module_forward_hook(nothing),
    "hook before all modules": lambda step: modules.register_module_forward_pre_hook(nothing),
    "default dtype": lambda step: set_to(
        torch.set_default_dtype, torch.float64, torch.get_default_dtype()
    ),
    "deterministic algorithms": lambda step: set_to(
        torch.use_deterministic_algorithms, True, torch.are_deterministic_algorithms_enabled()
    ),
    "float32 products": lambda step: tf32(True),
    "float32 convolutions": lambda step: tf32(False),
    "cuDNN's determinism": lambda step: another(CUDNN, "deterministic", not CUDNN.deterministic),
    "cuDNN": lambda step: another(CUDNN, "enabled", not CUDNN.enabled),
}


@pytest.fixture(scope="module")
def prepared() -> tuple[Step, Any]:
    """A step whose parts have a state and can sleep, and one of its batches."""
    step = tiny_step(tiny_model(), "atta-1", weights="awp", warmup_epochs=0, **EPOCHS)
    seen: list[Any] = []
    passes = step.internals.passes.compute_gradients

    def noting(batch: Any, buffers: Any = None) -> Any:
        seen.append(batch)
        return passes(batch, buffers)

    with another(step.internals.passes, "compute_gradients", noting):
        train(step)
    return step, seen[0]


@pytest.mark.parametrize("key", KEYS)
def test_each_of_these_alone_is_another_situation(key: str, prepared: tuple[Step, Any]) -> None:
    step, batch = prepared
    update = step.internals.update
    before = situation(update, batch, 0)
    with KEYS[key](step):
        assert situation(update, batch, 0) != before
    assert situation(update, batch, 0) == before


BATCHES: dict[str, Callable[[Any], Any]] = {
    "shape": lambda batch: batch._replace(x=batch.x[:-1]),
    "dtype": lambda batch: batch._replace(x=batch.x.float()),
    "strides": lambda batch: batch._replace(x=batch.x.to(memory_format=torch.channels_last)),
    "start": lambda batch: batch._replace(start=batch.x),
    "view": lambda batch: batch._replace(view=view_of(COUNT)),
    "second": lambda batch: batch._replace(second=batch.x),
    "threat": lambda batch: batch._replace(threat=Threat("l2", 0.1)),
    "radius": lambda batch: batch._replace(threat=Threat("linf", 0.2)),
    "a radius for each image": lambda batch: batch._replace(
        threat=Threat("linf", torch.full((COUNT,), 0.1))
    ),
    "mask": lambda batch: batch._replace(
        threat=Threat("linf", 0.1, mask=torch.ones(1, 1, 6, 6, dtype=torch.bool))
    ),
    "targeted": lambda batch: batch._replace(threat=Threat("linf", 0.1, targeted=True)),
}


@pytest.mark.parametrize("what", BATCHES)
def test_another_batch_is_another_situation(what: str, prepared: tuple[Step, Any]) -> None:
    step, batch = prepared
    update = step.internals.update
    others = {name: situation(update, make(batch), 0) for name, make in BATCHES.items()}
    assert others.pop(what) not in (situation(update, batch, 0), *others.values())


def test_another_python_state_is_another_situation(prepared: tuple[Step, Any]) -> None:
    step, batch = prepared
    update = step.internals.update
    assert situation(update, batch, 0) != situation(update, batch, 1)
    assert hash(situation(update, batch, 0)) == hash(situation(update, batch, 0))
