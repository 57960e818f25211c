"""After a call that breaks off everything is bit for bit as before; the next call is correct."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from every_recipe import call, step_of
from tiny_capture import capture
from tiny_staged import staged_model
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv import kernels
from fastadv.algorithms.recipes.table import METHODS
from fastadv.errors import UserError
from fastadv.kernels.dispatch import OPERATORS
from fastadv.training.training_step import Step

BEGUN = 2  # calls before the one that breaks off: warm-ups are over, states are moving

QUICK = {"awp", "rwp", "trades-awp", "apart", "free", "atta-3", "te", "trades-sat", "swa"}
OTHERS = [name for name in METHODS if name not in QUICK]


class Broke(Exception):
    """Stands for an error raised by PyTorch."""


class Bomb:
    """Raises at call number ``at`` of the places that are connected to it."""

    def __init__(self) -> None:
        self.calls, self.at, self.kind = 0, -1, Broke

    def tick(self) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise self.kind("out of memory")

    def wired(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, with a place before it and one after it."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            found = function(*args, **kwargs)
            self.tick()
            return found

        return run


class EveryOperation(TorchDispatchMode):
    """Connects every operation of PyTorch."""

    def __init__(self, bomb: Bomb) -> None:
        super().__init__()
        self.bomb = bomb

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.bomb.tick()
        return func(*args, **(kwargs or {}))


@contextmanager
def wired(step: Step, bomb: Bomb) -> Iterator[None]:
    """Every forward, gradient, kernel and step of the optimizer is a place."""
    with ExitStack() as stack:
        for name in OPERATORS:
            function = getattr(kernels, name)
            stack.enter_context(mock.patch.object(kernels, name, bomb.wired(function)))
        grad = bomb.wired(torch.autograd.grad)
        stack.enter_context(mock.patch.object(torch.autograd, "grad", grad))
        optimizer = step.optimizer
        stack.enter_context(mock.patch.object(optimizer, "step", bomb.wired(optimizer.step)))
        hooks = [step.model.register_forward_pre_hook(lambda *_: bomb.tick())]
        hooks.append(step.model.register_forward_hook(lambda *_: bomb.tick()))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def everything(step: Step) -> dict[str, Any]:
    """Copies of everything that a call may change."""
    model, updater = step.model, step.internals.updater
    parts = step.plan.parts.values()
    return copy.deepcopy(
        {
            "model": model.state_dict(),
            "optimizer": updater.optimizer.state_dict(),
            "state": step.state_dict(),
            "flags": [module.training for module in model.modules()],
            "learning": [parameter.requires_grad for parameter in model.parameters()],
            # Those of a recording are written over by its next replay, whatever becomes of that.
            "gradients": [
                p.grad for p in model.parameters() if step.internals.passes is step.internals.update
            ],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "names": [name for name, _ in model.named_modules()],
            "active": [part.active for part in parts],
            "generator": torch.get_rng_state(),
        }
    )


def assert_equal(first: Any, second: Any, path: str = "") -> None:
    """Equal bit for bit, with NaN equal to NaN."""
    if isinstance(first, torch.Tensor):
        torch.testing.assert_close(second, first, rtol=0, atol=0, equal_nan=True, msg=path)
    elif isinstance(first, dict):
        assert first.keys() == second.keys(), path
        for key in first:
            assert_equal(first[key], second[key], f"{path}.{key}")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), path
        for place, pair in enumerate(zip(first, second, strict=True)):
            assert_equal(*pair, f"{path}.{place}")
    else:
        assert first == second, path


def made(method: str, mode: str) -> Step:
    torch.manual_seed(0)
    step = step_of(method, staged_model(), "compiled" if mode == "compiled" else "eager")
    if mode == "captured":
        capture(step)
    for update in range(BEGUN):
        call(step, update)
    return step


def held_at(step: Step, twin: Step, places: Callable[[int], list[int]], wire: Any) -> None:
    """Break the next call at ``places(how many there are)``, then make it, and compare."""
    before = everything(step)
    bomb = Bomb()
    probe = made_like(step)
    with wire(probe, bomb):
        call(probe, BEGUN)
    chosen = places(bomb.calls)
    assert chosen
    for number, at in enumerate(chosen):
        bomb = Bomb()
        bomb.at, bomb.kind = at, (Broke, KeyboardInterrupt)[number % 2]
        with wire(step, bomb), pytest.raises((Broke, KeyboardInterrupt)):
            call(step, BEGUN)
        assert_equal(before, everything(step), f"broken at {at} of {bomb.calls}")
    found, expected = call(step, BEGUN), call(twin, BEGUN)
    assert_equal(expected, found)
    torch.manual_seed(1)
    after = everything(step)
    torch.manual_seed(1)
    assert_equal(everything(twin), after)


def made_like(step: Step) -> Step:
    """Another step with the same method and mode."""
    return made(step.plan.method, "compiled" if step.internals.net.runner.compiles else "eager")


def spread(count: int) -> Callable[[int], list[int]]:
    """This many of all places, including the first and the last."""

    def choose(calls: int) -> list[int]:
        step = max(1, (calls - 1) // (count - 1))
        return sorted({*range(1, calls + 1, step), calls})

    return choose


def all_of_them(calls: int) -> list[int]:
    return list(range(1, calls + 1))


@contextmanager
def every_operation(step: Step, bomb: Bomb) -> Iterator[None]:
    with EveryOperation(bomb):
        yield


@pytest.mark.parametrize(
    "method",
    [*sorted(QUICK), *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)],
)
def test_a_call_that_breaks_off_leaves_no_trace(method: str) -> None:
    """At every forward, gradient, kernel and step of the optimizer, before and after it."""
    step = made(method, "eager")
    if "second_view" in step.plan.needs:
        torch.manual_seed(0)
    held_at(step, made(method, "eager"), all_of_them, wired)


@pytest.mark.parametrize(
    "method",
    [
        *("awp", "atta-3"),
        *(pytest.param(name, marks=pytest.mark.slow)
          for name in ("apart", "free", "rwp", "te", "trades-sat", "ema")
          if name in METHODS),
    ],
)  # fmt: skip
def test_a_call_that_breaks_off_inside_an_operation_leaves_no_trace(method: str) -> None:
    """Anywhere: between two operations of the optimizer, in the middle of a state's update."""
    step = made(method, "eager")
    held_at(step, made(method, "eager"), spread(30), every_operation)


@contextmanager
def regions(step: Step, bomb: Bomb) -> Iterator[None]:
    """Where a compiled region or a replayed graph begins and ends."""
    net, passes = step.internals.net, step.internals.passes
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(net, "runner", _Wired(net.runner, bomb)))
        for name in ("compute_gradients", "apply_gradients", "finish_update"):
            function = bomb.wired(getattr(passes, name))
            stack.enter_context(mock.patch.object(passes, name, function))
        yield


class _Wired:
    """A runner whose regions are places."""

    def __init__(self, runner: Any, bomb: Bomb) -> None:
        self.runner, self.bomb = runner, bomb

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def __call__(self, region: Any, *inputs: Any) -> Any:
        return self.bomb.wired(self.runner)(region, *inputs)


@pytest.mark.parametrize("mode", [pytest.param("compiled", marks=pytest.mark.slow), "captured"])
@pytest.mark.parametrize(
    "method", ["awp", pytest.param("apart", marks=pytest.mark.slow),
               pytest.param("trades-sat", marks=pytest.mark.slow),
               pytest.param("atta-3", marks=pytest.mark.slow)]
)  # fmt: skip
def test_a_call_that_breaks_off_between_regions_leaves_no_trace(method: str, mode: str) -> None:
    step = made(method, mode)
    held_at(step, made(method, mode), all_of_them, regions)


@pytest.mark.parametrize("method", ["apart", "awp", "free"])
def test_the_first_call_may_also_break_off(method: str) -> None:
    step, twin, probe = (step_of(method, staged_model()) for _ in range(3))
    bomb = Bomb()
    with wired(probe, bomb):
        call(probe, 0)
    for at in (bomb.calls // 2, bomb.calls - 1, bomb.calls):
        bomb = Bomb()
        bomb.at = at
        with wired(step, bomb), pytest.raises(Broke):
            call(step, 0)
    call(step, 0), call(twin, 0)
    assert_equal(twin.model.state_dict(), step.model.state_dict())
    assert_equal(twin.state, step.state)


def test_an_optimizer_that_raises_half_way() -> None:
    step = made("awp", "eager")
    before = everything(step)

    def half(*_: Any) -> None:
        with torch.no_grad():
            for weight in list(step.model.parameters())[:3]:
                weight.add_(1.0)
                step.optimizer.state[weight]["momentum_buffer"].mul_(2.0)
        step.optimizer.param_groups[0]["momentum"] = 0.1
        raise RuntimeError("no")

    with mock.patch.object(step.optimizer, "step", half), pytest.raises(RuntimeError):
        call(step, BEGUN)
    assert_equal(before, everything(step))


def test_accumulated_gradients_are_kept() -> None:
    step, twin = made("pgd", "eager"), made("pgd", "eager")
    for each in (step, twin):
        each.optimizer.zero_grad()
        call_adding(each, 5)
    bomb = Bomb()
    bomb.at = 4
    with wired(step, bomb), pytest.raises(Broke):
        call_adding(step, 6)
    call(step, 7), call(twin, 7)
    assert_equal(twin.model.state_dict(), step.model.state_dict())


def call_adding(step: Step, update: int) -> None:
    x, y, index = batch(update)
    step(x, y, index, update=False)


def batch(update: int) -> Any:
    from tiny import tiny_batch

    x, y, *_ = tiny_batch(6, seed=update)
    return x, y, torch.arange(6)


def test_a_refused_batch_changes_nothing() -> None:
    step = made("atta-3", "eager")
    before = everything(step)
    x, y, index = batch(9)
    for wrong in ({"y": y - 100}, {"x": x * 255}, {"index": index - 7}):
        with pytest.raises(UserError):
            step(**({"x": x, "y": y, "index": index} | wrong))
        assert_equal(before, everything(step))
