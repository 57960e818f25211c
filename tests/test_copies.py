"""Copies and pickles of models and steps; a step leaves nothing on the user's objects."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from every_recipe import call, step_of
from tiny import assert_same, tiny_batch, tiny_model, tiny_step
from tiny_capture import capture
from tiny_staged import staged_model
from torch import nn

import fastadv
from fastadv.errors import UserError
from fastadv.training.training_step import Step

METHODS = ["pgd", "trades", "awp", "rwp", "apart", "fgsm-plus", "atta-1", "free", "te", "swa"]
COPIES: dict[str, Callable[[Step], Step]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda step: pickle.loads(pickle.dumps(step)),
}


def hooks_of(model: nn.Module) -> int:
    return sum(
        len(m._forward_pre_hooks) + len(m._forward_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_a_step_continues_bit_for_bit_and_independently(method: str, way: str) -> None:
    step = step_of(method, staged_model())
    for update in range(2):
        call(step, update)
    other = COPIES[way](step)
    before = copy.deepcopy(step.model.state_dict())
    call(other, 2)
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    call(step, 2)
    assert_same(step.model, other.model, 0)
    for name, tensor in step.state.items():
        assert torch.equal(tensor, other.state[name]), name


@pytest.mark.parametrize("way", COPIES)
def test_copies_in_low_precision_and_of_recordings(way: str) -> None:
    """Low-precision weights share memory in a step; those of a copy are its own."""
    x, y, index, start = tiny_batch()
    x, start = x.float(), start.float()
    for captured in (False, True):
        step = tiny_step(tiny_model().float(), "pgd-eval", steps=2, amp=True)
        step = capture(step) if captured else step
        step(x, y, index, start=start)
        other = COPIES[way](step)
        for _ in range(3):
            step(x, y, index, start=start)
            other(x, y, index, start=start)
        assert_same(step.model, other.model, 0)


@pytest.mark.parametrize("method", ["apart", "pgd-eval", "awp"])
def test_a_model_is_copied_and_saved_clean_after_a_step(method: str) -> None:
    model = staged_model()
    step = step_of(method, model)
    call(step, 0)
    assert hooks_of(model) == 0
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    x = tiny_batch(6)[0]
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert hooks_of(other) == 0
        assert_same(model, other, 0)
        assert torch.equal(other.eval()(x), copy.deepcopy(model).eval()(x))


def test_a_deleted_step_leaves_nothing_behind() -> None:
    model = staged_model()
    for _ in range(3):
        step = step_of("apart", model)
        call(step, 0)
    gone = weakref.ref(step)
    del step
    gc.collect()
    assert gone() is None
    assert hooks_of(model) == 0


def test_two_steps_of_one_model_are_independent() -> None:
    """The passes of one step do not contain APART's noise of the other."""
    model, alone = staged_model(), staged_model()
    idle = step_of("apart", model)
    call(idle, 0)
    alone.load_state_dict(model.state_dict())
    for each in (model, alone):
        call(step_of("apart", each), 1)
    assert_same(model, alone, 0)


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_that_would_lose_something_is_refused(way: str) -> None:
    step = step_of("pgd", staged_model())
    call(step, 0)
    handle = step.model.linear.weight.register_hook(lambda gradient: gradient)
    with pytest.raises(UserError, match=r"hook on linear\.weight"):
        COPIES[way](step)
    handle.remove()
    x, y, index, _ = tiny_batch()
    step(x, y, index % 12, update=False)
    with pytest.raises(UserError, match="gradient that waits"):
        COPIES[way](step)


# -- another threat, other images ------------------------------------------------------------------


def far(step: Step, x: torch.Tensor) -> float:
    """The largest distance between x and the images trained on."""
    seen: list[torch.Tensor] = []
    handle = step.model.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach()))
    y, index = tiny_batch(len(x))[1:3]
    step(x, y, index % 12)
    handle.remove()
    return float((seen[-1] - x).abs().max())


@pytest.mark.parametrize("mode", ["eager", "captured"])
@pytest.mark.parametrize("method", ["pgd", "fgsm-r", "pgd-eval", "free", "atta-1"])
def test_another_eps_takes_effect_at_the_next_call(method: str, mode: str) -> None:
    x = tiny_batch()[0].clamp(0.3, 0.7)
    step = step_of(method, staged_model())
    step = capture(step) if mode == "captured" else step
    far(step, x)
    for eps in (0.02, 0.2, 0.0):
        step.threat = fastadv.Threat("linf", eps)
        assert step.threat.eps == eps
        reached = [far(step, x) for _ in range(2)][-1]
        assert reached <= eps + 1e-12
        assert reached > 0.4 * eps or eps == 0


def test_another_eps_is_compiled_in() -> None:
    x, y, index, start = tiny_batch()
    models = [tiny_model(), tiny_model()]
    for model, mode in zip(models, ("eager", "compiled"), strict=True):
        step = tiny_step(model, "fgsm", mode=mode)
        for eps in (0.1, 0.01):
            step.threat = fastadv.Threat("linf", eps)
            step(x, y, index, start=start)
    assert_same(*models)


def test_an_impossible_threat_is_refused() -> None:
    step = step_of("apart", staged_model())
    call(step, 0)
    before = step.threat
    with pytest.raises(UserError, match="norm='linf'"):
        step.threat = fastadv.Threat("l2", 1.0)
    with pytest.raises(UserError, match=r"fastadv\.Threat"):
        step.threat = 0.1
    assert step.threat is before


@pytest.mark.parametrize("method", ["apart", "fgsm-plus", "atta-1", "free"])
def test_images_of_another_size_are_refused_if_perturbations_are_stored(method: str) -> None:
    step = step_of(method, staged_model())
    x, y, index, _ = tiny_batch()
    step(x, y, index % 12)
    before = copy.deepcopy(step.state)
    with pytest.raises(UserError, match="3x6x6, but these images have size 3x4x4"):
        step(x[..., :4, :4], y, index % 12)
    for name, tensor in step.state.items():
        assert torch.equal(tensor, before[name])
    step(x, y, index % 12)


@pytest.mark.parametrize("method", ["pgd", "te", "trades"])
def test_other_methods_take_any_size(method: str) -> None:
    """As a step that has only seen images of that size, which goes on from the same state."""
    step = step_of(method, staged_model())
    x, y, index, _ = tiny_batch()
    step(x, y, index % 12)
    state = copy.deepcopy(step.state_dict())
    state["allocated"][0] = [3, 4, 4]
    fresh = step_of(method, copy.deepcopy(step.model))
    fresh.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    fresh.load_state_dict(state)
    for each in (step, fresh):
        each(x[..., :4, :4], y, index % 12)
    assert_same(step.model, fresh.model, 0)
    assert step.state.keys() == fresh.state.keys()
    for name, tensor in step.state.items():
        assert torch.equal(tensor, fresh.state[name]), name
