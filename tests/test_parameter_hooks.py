"""Hooks on parameters run once per update, on its gradient, in every mode and precision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from every_recipe import call, step_of
from tiny import assert_same, sgd, tiny_batch, tiny_model, tiny_step
from tiny_capture import Replayer, capture
from tiny_staged import staged_model
from torch import Tensor, nn

import fastadv
from fastadv.errors import UserError
from fastadv.training.captured import CapturedUpdate

PLAIN = {"momentum": 0.0, "weight_decay": 0.0}
NARROW = {"amp": True}


class Half:
    """Halves a gradient and keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, gradient: Tensor) -> Tensor:
        self.seen.append(gradient.clone())
        return gradient / 2


def moved(model: nn.Module, before: nn.Module) -> dict[str, Tensor]:
    old = before.state_dict()
    return {name: p.detach() - old[name] for name, p in model.named_parameters()}


METHODS = {
    "pgd": {"steps": 2},
    "trades": {"steps": 2},
    "pgd-eval": {"steps": 2},
    "awp": {"steps": 2, "warmup_epochs": 0},
    "rwp": {"steps": 2, "weight_steps": 2},
    "fgsm-n-gradalign": {},
    "apart": {"total_steps": 8},
}


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_a_hook_acts_on_the_gradient_of_the_update_and_runs_once(method: str, amp: bool) -> None:
    """SGD without momentum moves the hooked weight half as far, and everything else as far."""
    x, y, index, start = tiny_batch()
    x, start = x.float(), start.float()
    first = tiny_model().float()
    models = [first, copy.deepcopy(first)]
    hook = Half()
    models[1].linear.weight.register_hook(hook)
    models[1].conv1.weight.register_hook(lambda gradient: 0 * gradient)
    for model in models:
        options = METHODS[method] | {"amp": amp, "optimizer": sgd(model, **PLAIN)}
        tiny_step(model, method, **options)(x, y, index, start=start)
    plain, hooked = (moved(model, tiny_model().float()) for model in models)
    assert len(hook.seen) == 1
    assert plain["linear.weight"].abs().max() > 0
    # The movement is known to the rounding of the weights.
    torch.testing.assert_close(
        hooked.pop("linear.weight"), plain.pop("linear.weight") / 2, rtol=0, atol=1e-7
    )
    assert plain.pop("conv1.weight").abs().max() > 0
    left = hooked.pop("conv1.weight").abs().max()
    assert left <= (1e-7 if method in ("awp", "rwp") else 0)  # taken back from w + v
    for name, change in hooked.items():
        torch.testing.assert_close(change, plain[name], rtol=0, atol=1e-7)


def test_hooks_run_beside_a_compiled_graph_and_registered_late() -> None:
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    steps = [
        tiny_step(model, "pgd", steps=2, mode=mode)
        for model, mode in zip(models, ("eager", "compiled"), strict=True)
    ]
    hooks = [Half(), Half()]
    for update in range(3):
        for model, step, hook in zip(models, steps, hooks, strict=True):
            if update == 1:
                handle = model.linear.weight.register_hook(hook)
            step(x, y, index, start=start)
            if update == 1:
                handle.remove()
    assert [len(hook.seen) for hook in hooks] == [1, 1]
    assert_same(*models)
    other = tiny_model()
    never = tiny_step(other, "pgd", steps=2)
    for _ in range(3):
        never(x, y, index, start=start)
    assert not torch.equal(other.linear.weight, models[0].linear.weight)


@pytest.mark.parametrize("method", ["free", "pgd"])
def test_every_update_and_every_added_gradient_runs_it(method: str) -> None:
    step = step_of(method, staged_model())
    hook = Half()
    step.model.linear.weight.register_hook(hook)
    call(step, 0)
    assert len(hook.seen) == step.updates_per_batch
    if method == "pgd":
        x, y, index, start = tiny_batch()
        step(x, y, index % 12, start=start, update=False)
        step(x, y, index % 12, start=start)
        assert len(hook.seen) == 3
        torch.testing.assert_close(step.model.linear.weight.grad, (hook.seen[1] + hook.seen[2]) / 4)


def test_it_sees_the_scaled_gradient_as_in_a_plain_loop() -> None:
    x, y, index, start = tiny_batch()
    model = tiny_model().float()
    hook = Half()
    model.linear.bias.register_hook(hook)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    step = tiny_step(model, "pgd", steps=1, amp=True, amp_dtype="fp16", scaler=scaler)
    step(x.float(), y, index, start=start.float())
    torch.testing.assert_close(model.linear.bias.grad, hook.seen[0] / 2 / 64)


def test_a_hook_after_accumulation_sees_the_gradient_of_the_optimizer() -> None:
    x, y, index, start = tiny_batch()
    model, before, other = tiny_model(), tiny_model(), tiny_model()
    found: list[Tensor] = []

    def clip(parameter: Tensor) -> None:
        parameter.grad.clamp_(-1e-3, 1e-3)
        found.append(parameter.grad.clone())

    model.linear.weight.register_post_accumulate_grad_hook(clip)
    for each in (model, other):
        optimizer = sgd(each, **PLAIN)
        tiny_step(each, "awp", steps=1, optimizer=optimizer)(x, y, index, start=start)
    assert len(found) == 1
    assert found[0].abs().max() == 1e-3
    change = moved(model, before)["linear.weight"]
    torch.testing.assert_close(change, -0.05 * found[0], rtol=0, atol=1e-12)


def hooked_and_captured(strict: bool) -> tuple[Any, Half]:
    step = capture(step_of("pgd", staged_model()))
    step.internals.passes = CapturedUpdate(step.internals.update, Replayer(), strict=strict)
    call(step, 0)
    assert step.internals.passes.recorded == 1
    hook = Half()
    step.model.linear.weight.register_hook(hook)
    return step, hook


def test_a_recording_runs_no_hook_and_is_not_replayed() -> None:
    step, _ = hooked_and_captured(strict=True)
    with pytest.raises(UserError, match=r"linear\.weight has a hook"):
        call(step, 1)
    step, hook = hooked_and_captured(strict=False)
    with pytest.warns(UserWarning, match=r"linear\.weight has a hook"):
        call(step, 1)
    assert len(hook.seen) == 1
    other = step_of("pgd", staged_model())
    call(other, 0)
    other.model.linear.weight.register_hook(Half())
    call(other, 1)
    assert_same(step.model, other.model)


def test_hooks_are_restored_after_an_exception() -> None:
    model = tiny_model()
    hook = Half()
    handle = model.linear.weight.register_hook(hook)
    step = tiny_step(model, "pgd", steps=1)

    def break_off(module: nn.Module, *_: Any) -> None:
        if module.training and module.weight.requires_grad:
            raise ArithmeticError("in the pass that learns")

    broken = model.linear.register_forward_hook(break_off)
    x, y, index, _ = tiny_batch()
    with pytest.raises(ArithmeticError):
        step(x, y, index)
    broken.remove()
    model(x).sum().backward()
    assert len(hook.seen) == 1
    handle.remove()
    model(x).sum().backward()
    assert len(hook.seen) == 1


def test_the_short_form_of_the_report() -> None:
    """A hook that zeroes the gradient under amp, through the public interface."""
    model = fastadv.build_model("preact_resnet18", num_classes=4, width=4, in_channels=3)
    weight = model.get_parameter([name for name, _ in model.named_parameters()][-2])
    weight.register_hook(lambda gradient: 0 * gradient)
    before = weight.detach().clone()
    step = fastadv.step(model, torch.optim.SGD(model.parameters(), 0.1), "fgsm", amp=True)
    step(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert torch.equal(weight, before)
