"""Optimizers on a pretended GPU, between the graphs of a captured step, replayed where possible.

``test_cuda_fake.py`` runs this file in a process of its own.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from math import inf
from typing import Any

import pretend_gpu as gpu
import pytest
import torch
from every_recipe import COUNT
from pretend_gpu import Recorder
from pretend_steps import assert_same_run, call, captured, on_device, recordings
from tiny import LEARNING, sgd, tiny_batch, tiny_model, tiny_step
from tiny_staged import staged_model
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastadv
from fastadv.engine.cuda_graph import NotReplayable
from fastadv.engine.optimizer.replayed import MAX_RERECORDINGS
from fastadv.engine.optimizer.updater import Updater
from fastadv.training.training_step import Step

PASSES = (
    2  # recordings of an update without its optimizer: the passes, and the work after the optimizer
)
# float32 weights, whose rate is rounded to float32 in a recording.
NEARLY = 1e-6

# What a recorded update holds; ``on_pretend_gpu.JUDGED`` says what that means.
JUDGED = {
    *("_foreach_add_", "_foreach_addcdiv_", "_foreach_addcmul_", "_foreach_copy_", "_foreach_div"),
    *("_foreach_div_", "_foreach_lerp_", "_foreach_mul_", "_foreach_neg_", "_foreach_norm"),
    *("_foreach_pow", "detach"),
    *("_foreach_reciprocal_", "_foreach_sqrt", "_foreach_sqrt_", "_foreach_sub_", "_fused_adam_"),
    *("_fused_adamw_", "_fused_sgd_", "_to_copy", "abs", "add", "all", "any", "argmax"),
    *("bitwise_and", "bitwise_not", "bitwise_or"),
    *("clamp", "copy_", "empty_like", "eq", "linalg_vector_norm", "lt", "mul", "mul_", "ne"),
    *("cat", "ones_like", "reciprocal", "split_with_sizes", "stack", "sum", "view", "where"),
    *("zeros",),
}


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with gpu.pretend_gpu():
        yield


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("kind", ["sgd", "fused sgd", "adam", "fused adam"])
def test_an_optimizer_stops_at_the_first_bad_update(kind: str, max_grad_norm: float | None) -> None:
    fused, algorithm = "fused" in kind, torch.optim.SGD if "sgd" in kind else torch.optim.Adam
    steps, weights = [], []
    for model in (tiny_model(), on_device(tiny_model())):
        settings = {"momentum": 0.9} if "sgd" in kind else {}
        optimizer = algorithm(model.parameters(), lr=0.05, fused=fused or None, **settings)
        steps.append(tiny_step(model, "fgsm", optimizer=optimizer, max_grad_norm=max_grad_norm))
        call(steps[-1], 0)
        with gpu.no_waits():
            call(steps[-1], 1)
            weights.append({n: gpu.to_host(v.clone()) for n, v in model.state_dict().items()})
            call(steps[-1], 2, not_finite=True)
            call(steps[-1], 3)
    assert_same_run(steps[1], steps[0])
    for name, value in steps[1].model.state_dict().items():
        assert torch.equal(gpu.to_host(value), weights[1][name]), name
    with pytest.raises(fastadv.TrainingError, match="step 2"):
        steps[1].check()


@pytest.mark.parametrize("accumulate", [False, True])
def test_gradients_reach_a_fused_optimizer_in_the_layout_of_their_weights(accumulate: bool) -> None:
    """Images in channels_last give convolutions such gradients, whatever their weights are."""
    steps = []
    for model in (tiny_model(), on_device(tiny_model())):
        optimizer = torch.optim.SGD(model.parameters(), **LEARNING, fused=True)
        steps.append(tiny_step(model, "fgsm", optimizer=optimizer))
        x, y, index = tiny_batch(COUNT)[:3]
        x = x.to(memory_format=torch.channels_last)
        if len(steps) == 2:
            x, y, index = gpu.to_device((x, y, index))
        for update in (not accumulate, True):
            steps[-1](x, y, index, update=update)
        strides = [(p.stride(), p.grad.stride()) for p in model.parameters()]
        assert all(weight == gradient for weight, gradient in strides)
    assert_same_run(steps[1], steps[0])


@pytest.mark.parametrize("kind", ["sgd", "fused sgd", "adam"])
def test_overflowing_updates_are_skipped_as_by_a_grad_scaler(kind: str) -> None:
    """The first update, when the optimizer has no state, and a later one."""
    ours, theirs = on_device(tiny_model()), tiny_model()
    if kind == "adam":
        own, other = (torch.optim.Adam(m.parameters(), lr=0.01) for m in (ours, theirs))
    else:
        # PyTorch's fused SGD continues from unwritten memory if a scaler masks its first step.
        other = sgd(theirs)
        own = torch.optim.SGD(ours.parameters(), **LEARNING, fused="fused" in kind)
    scaler, plain = (torch.amp.GradScaler(name, init_scale=8.0) for name in (gpu.NAME, "cpu"))
    updater = Updater(own, gpu.DEVICE, scaler, None)
    loss, number, of_loss = gpu.to_device((torch.ones(()), torch.tensor(0), torch.ones(())))
    for place, size in enumerate([inf, 1.0, 1.0, inf, 1.0]):
        scale = plain.scale(torch.ones(()))
        gradients = [torch.full_like(p, size) * scale for p in theirs.parameters()]
        waits = place < 2 or kind == "adam"  # until the first one that counts
        with nullcontext() if waits else gpu.no_waits():
            updater.begin(of_loss)
            given = gpu.to_device([gradient.clone() for gradient in gradients])
            updater([*ours.parameters()], given, loss, number, {}, images=1, update=True)
        for parameter, gradient in zip(theirs.parameters(), gradients, strict=True):
            parameter.grad = gradient
        plain.step(other)
        plain.update()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(gpu.to_host(found), expected, rtol=1e-12, atol=1e-12)
    assert scaler.get_scale() == plain.get_scale() == 2.0
    updater.faults.check()


# -- with their own graph ------------------------------------------------------------------------


Optimizers = dict[str, Callable[[nn.Module], torch.optim.Optimizer]]

REPLAYED: Optimizers = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), **LEARNING, fused=True),
    "nesterov": lambda model: torch.optim.SGD(
        model.parameters(), **LEARNING, nesterov=True, fused=True
    ),
    "two rates": lambda model: torch.optim.SGD(
        [
            {"params": [*model.conv1.parameters()], "lr": 0.1},
            {"params": [p for n, p in model.named_parameters() if not n.startswith("conv1")]},
        ],
        **LEARNING,
        fused=True,
    ),
    "adam": lambda model: torch.optim.Adam(
        model.parameters(), foreach=True, capturable=next(model.parameters()).device.type != "cpu"
    ),
    "fused adamw": lambda model: torch.optim.AdamW(
        model.parameters(),
        fused=True,
        capturable=next(model.parameters()).device.type != "cpu",
    ),
}


def pair(
    make: Callable[[nn.Module], torch.optim.Optimizer], *, double: bool = False, **options: Any
) -> tuple[Step, Step]:
    """The same step on the CPU and captured on the device."""
    cpu, device = (tiny_model() if double else tiny_model().float() for _ in range(2))
    device = on_device(device)
    return (
        tiny_step(cpu, "standard", optimizer=make(cpu), **options),
        captured(tiny_step(device, "standard", optimizer=make(device), **options)),
    )


def falling(step: Step) -> torch.optim.lr_scheduler.LambdaLR:
    """A rate that changes with every update."""
    return torch.optim.lr_scheduler.LambdaLR(step.optimizer, lambda update: 0.8**update)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
@pytest.mark.parametrize("kind", REPLAYED)
def test_a_replayed_optimizer_follows_its_rate(kind: str, max_grad_norm: float | None) -> None:
    cpu, step = steps = pair(REPLAYED[kind], max_grad_norm=max_grad_norm)
    rates = [falling(each) for each in steps]
    for update in range(6):
        with nullcontext() if update == 0 else gpu.no_waits():
            norms = [call(each, update)["grad_norm"] for each in steps]
        torch.testing.assert_close(gpu.to_host(norms[1]), norms[0], rtol=1e-4, atol=0)
        for rate in rates:
            rate.step()
    assert_same_run(step, cpu, NEARLY)
    assert len(recordings(step)) == PASSES + 1
    held = {str(entry[0]).split(".")[1] for entry in recordings(step)[-1].calls}
    assert held <= JUDGED, "not judged yet"
    assert all(isinstance(g["lr"], float) for g in step.optimizer.param_groups)


def with_hook(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = REPLAYED["sgd"](model)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


def patched(model: nn.Module) -> torch.optim.Optimizer:
    """The user's code counts the optimizer's steps, and a scheduler wraps that."""
    optimizer = REPLAYED["sgd"](model)
    own = optimizer.step
    optimizer.step = types.MethodType(lambda self: own(), optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 1.0)
    return optimizer


class Counting(torch.optim.SGD):
    """An optimizer that the user wrote."""


AS_WRITTEN: Optimizers = {
    "not fused": sgd,
    "not capturable": lambda model: torch.optim.Adam(model.parameters(), fused=True),
    "with a hook": with_hook,
    "not torch's": lambda model: Counting(model.parameters(), **LEARNING, fused=True),
    "patched": patched,
    "a tensor as decay": lambda model: torch.optim.SGD(
        model.parameters(), lr=0.05, weight_decay=torch.tensor(5e-4), fused=True
    ),
}


@pytest.mark.parametrize("kind", [*AS_WRITTEN, "float64", "a scaler"])
def test_other_optimizers_step_without_a_graph(kind: str) -> None:
    make = AS_WRITTEN.get(kind, REPLAYED["sgd"])
    cpu, step = pair(make, double=kind == "float64")
    if kind == "a scaler":
        step.internals.updater.scaler = torch.amp.GradScaler(gpu.NAME, init_scale=1.0)
    for update in range(4):
        call(cpu, update), call(step, update)
    assert_same_run(step, cpu, NEARLY)
    assert len(recordings(step)) == PASSES


def test_a_hook_for_all_optimizers_is_called() -> None:
    _, step = pair(REPLAYED["sgd"])
    seen = []
    handle = register_optimizer_step_post_hook(lambda *_: seen.append(1))
    try:
        for update in range(4):
            call(step, update)
    finally:
        handle.remove()
    assert len(seen) == 4


def test_a_momentum_that_changes_every_step_is_followed() -> None:
    cpu, step = steps = pair(REPLAYED["sgd"])
    for update in range(5):
        for each in steps:
            call(each, update)
            each.optimizer.param_groups[0]["momentum"] = 0.9 - 0.1 * update
    assert_same_run(step, cpu, NEARLY)
    assert len(recordings(step)) == PASSES


def elsewhere(state: dict[str, Any]) -> dict[str, Any]:
    """The same values at other addresses."""
    moved = {
        key: {name: value.clone() for name, value in values.items()}
        for key, values in state["state"].items()
    }
    return state | {"state": moved}


@pytest.mark.parametrize("change", ["weight decay", "loaded state"])
def test_a_value_that_changes_once_is_recorded_once_more(change: str) -> None:
    cpu, step = steps = pair(REPLAYED["sgd"])
    for update in range(6):
        for each in steps:
            optimizer = each.optimizer
            if update == 3 and change == "weight decay":
                optimizer.param_groups[0]["weight_decay"] = 0.1
            elif update == 3:
                optimizer.load_state_dict(elsewhere(optimizer.state_dict()))
            call(each, update)
    assert_same_run(step, cpu, NEARLY)
    assert len(recordings(step)) == PASSES + 2


@pytest.mark.parametrize("form", ["group", "gradient"])
def test_layers_keep_their_rate_with_a_replayed_optimizer(form: str) -> None:
    steps = []
    for model in (staged_model().float(), on_device(staged_model().float())):
        # A rate in the gradient needs no own group.
        layers = "rat-lr" if form == "group" else "uniform"
        groups = fastadv.param_groups(model, layers=layers, lr=LEARNING["lr"])
        optimizer = torch.optim.SGD(groups, **LEARNING, fused=True)
        step = tiny_step(model, "standard", layers="rat-lr", rate_form=form, optimizer=optimizer)
        steps.append(captured(step) if steps else step)
    rates = [falling(each) for each in steps]
    for update in range(6):
        for each, rate in zip(steps, rates, strict=True):
            call(each, update)
            rate.step()
    assert_same_run(steps[1], steps[0], NEARLY)
    # Gradients that are scaled lie somewhere else every time.
    assert len(recordings(steps[1])) == PASSES + (form == "group")


def test_accumulated_and_deleted_gradients() -> None:
    cpu, step = steps = pair(REPLAYED["sgd"])
    for update in range(10):
        for each in steps:
            x, y, index, _ = tiny_batch(COUNT, seed=update)
            x = x.float()
            if each is step:
                x, y, index = gpu.to_device((x, y, index))
            each(x, y, index, update=update not in (3, 4))
            if update == 8:
                each.optimizer.zero_grad()
        for own, other in zip(step.model.parameters(), cpu.model.parameters(), strict=True):
            assert (own.grad is None) == (other.grad is None)
            if own.grad is not None and other.grad is not None:
                torch.testing.assert_close(gpu.to_host(own.grad), other.grad, rtol=1e-4, atol=1e-6)
    assert_same_run(step, cpu, NEARLY)


def test_batches_of_two_sizes_share_an_optimizer() -> None:
    cpu, step = pair(REPLAYED["sgd"])
    for update, count in enumerate([6, 6, 6, 4] * 3):
        call(cpu, update, count), call(step, update, count)
    assert_same_run(step, cpu, NEARLY)
    assert len(recordings(step)) == 2 * (PASSES + 1)


def test_a_replayed_optimizer_stops_at_the_first_bad_update() -> None:
    _, step = pair(REPLAYED["sgd"])
    for update in range(3):
        call(step, update)
    before = {n: gpu.to_host(v.clone()) for n, v in step.model.state_dict().items()}
    with gpu.no_waits():
        call(step, 3, not_finite=True)
        call(step, 4)
    for name, value in step.model.state_dict().items():
        assert torch.equal(gpu.to_host(value), before[name]), name
    with pytest.raises(fastadv.TrainingError, match="step 3"):
        step.check()


def of_optimizer(step: Step) -> int:
    recorder = step.internals.passes.recorder
    return len(recorder.recordings) - len(recorder.pool)


class Refusing(Recorder):
    """Records the passes, not the optimizer."""

    def __call__(
        self, function: Callable[[], Any], *, alone: bool = False
    ) -> tuple[Any, Callable[[], None]]:
        if alone:
            raise NotReplayable("of the test")
        return super().__call__(function)


def test_an_optimizer_that_cannot_be_recorded_continues_bit_for_bit() -> None:
    """As after a resume, when other updates are replayed than without the stop."""
    _, replayed = pair(REPLAYED["sgd"])
    _, refused = pair(REPLAYED["sgd"])
    refused.internals.passes.recorder = Refusing()
    call(refused, 0), call(refused, 1)
    with pytest.warns(UserWarning, match="optimizer cannot be replayed.*of the test"):
        call(refused, 2)
    with warnings.catch_warnings(action="error"):
        for update, count in [(3, COUNT), (4, 4), (5, 4), (6, 4)]:
            call(refused, update, count)
    for update, count in [(0, COUNT), (1, COUNT), (2, COUNT), (3, COUNT), (4, 4), (5, 4), (6, 4)]:
        call(replayed, update, count)
    assert_same_run(refused, replayed, 0.0)


def test_the_learning_rate_has_the_same_precision_in_every_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """CUDA's kernels tell 0.05 from float32's 0.05; those of this device's CPU do not."""
    seen, step_of_torch = [], torch.optim.SGD.step

    def spying(self: Any, closure: Any = None) -> None:
        seen.append(self.param_groups[0]["lr"].dtype)
        step_of_torch(self, closure)

    monkeypatch.setattr(torch.optim.SGD, "step", spying)
    _, step = pair(REPLAYED["sgd"])
    for update in range(6):
        call(step, update, adds=update == 1)
    assert seen == [torch.float32] * 4  # begun, after adding, seen once, recorded; not replayed
    assert of_optimizer(step) == 1


def test_a_learning_rate_on_the_device_is_read_there() -> None:
    rate = gpu.to_device(torch.tensor(0.05))
    cpu, step = pair(
        lambda model: torch.optim.SGD(
            model.parameters(),
            lr=0.05 if next(model.parameters()).device.type == "cpu" else rate,
            fused=True,
        )
    )
    call(cpu, 0), call(step, 0)
    with gpu.no_waits():
        for update in range(1, 5):
            cpu.optimizer.param_groups[0]["lr"] *= 0.5
            rate.mul_(0.5)
            call(cpu, update), call(step, update)
    assert_same_run(step, cpu, NEARLY)
    assert of_optimizer(step) == 1


def test_a_gradient_set_by_the_user_is_read_in_place() -> None:
    """A parameter outside of the model, which the caller learns in the same optimizer."""
    steps, others = [], []
    for model in (tiny_model().float(), on_device(tiny_model().float())):
        other = torch.ones(3, device=next(model.parameters()).device).requires_grad_()
        learning = [*model.parameters(), other]
        optimizer = torch.optim.SGD(learning, **LEARNING, fused=True)
        step = tiny_step(model, "standard", optimizer=optimizer)
        steps.append(captured(step) if steps else step)
        others.append(other)
    for update in range(5):
        for step, other in zip(steps, others, strict=True):
            other.grad = torch.full_like(other, update + 1.0)
            call(step, update)
    torch.testing.assert_close(gpu.to_host(others[1].detach()), others[0].detach())
    assert_same_run(steps[1], steps[0], NEARLY)
    assert len(recordings(steps[1])) == PASSES


def test_a_loaded_state_without_momentum_follows_its_rate() -> None:
    """There the groups are other objects, and nothing else has changed."""
    cpu, step = steps = pair(lambda m: torch.optim.SGD(m.parameters(), lr=0.05, fused=True))
    for update in range(7):
        for each in steps:
            optimizer = each.optimizer
            if update == 4:
                optimizer.load_state_dict(elsewhere(optimizer.state_dict()))
            optimizer.param_groups[0]["lr"] = 0.05 / (update + 1)
            call(each, update)
    assert_same_run(step, cpu, NEARLY)
    assert len(recordings(step)) == PASSES + 1


def test_accumulating_needs_no_recording_and_changes_need_few() -> None:
    _, step = pair(REPLAYED["sgd"])
    for update in range(4):
        call(step, update)
    for _ in range(3):
        call(step, 4, adds=True)
        for update in range(3):
            call(step, update)
    assert of_optimizer(step) == 1
    for change in range(2 * MAX_RERECORDINGS):
        step.optimizer.param_groups[0]["weight_decay"] = 0.001 * change
        for update in range(3):
            call(step, update)
    assert of_optimizer(step) == MAX_RERECORDINGS
