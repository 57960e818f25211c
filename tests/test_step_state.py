"""The state of a step is the same after saving and loading, for every recipe."""

import copy

import pytest
import torch
from every_recipe import call, step_of
from tiny import assert_same, tiny_batch, tiny_model, tiny_step, twin
from tiny_staged import staged_model

from fastadv.algorithms.recipes.table import METHODS
from fastadv.errors import UserError
from fastadv.training.training_step import Step


def resumed(step: Step, method: str, *, after_a_call: bool) -> Step:
    """A new step of the same run; loaded before its first call or after one."""
    other = step_of(method, twin(step.model))
    saved = copy.deepcopy((step.state_dict(), step.optimizer.state_dict()))
    if after_a_call:
        weights = copy.deepcopy(other.model.state_dict())
        call(other, 9)
        other.model.load_state_dict(weights)
    other.load_state_dict(saved[0])
    other.optimizer.load_state_dict(saved[1])
    return other


@pytest.mark.parametrize("after_a_call", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_run_is_bit_for_bit_the_same(method: str, after_a_call: bool) -> None:
    step = step_of(method, staged_model())
    for update in range(2):
        call(step, update)
    other = resumed(step, method, after_a_call=after_a_call)
    for update in (2, 3):
        losses = [one_call["loss"] for one_call in (call(step, update), call(other, update))]
        assert torch.equal(*losses)
    assert_same(step.model, other.model, tolerance=0)
    assert step.state.keys() == other.state.keys()
    for name, tensor in step.state.items():
        assert torch.equal(tensor, other.state[name]), name
    assert step.calls == other.calls == 4


def test_a_state_of_another_recipe_or_data_set_is_refused() -> None:
    step = step_of("apart", staged_model())
    call(step, 0)
    with pytest.raises(UserError, match="not of 'atta-1'"):
        step_of("atta-1", staged_model()).load_state_dict(step.state_dict())
    saved = copy.deepcopy(step.state_dict())
    omega = saved["parts"]["adversary"]["omega"]
    saved["parts"]["adversary"]["omega"] = omega[:, :, 1:]
    other = step_of("apart", staged_model())
    call(other, 0)
    with pytest.raises(UserError, match="saved omega"):
        other.load_state_dict(saved)


@pytest.mark.parametrize("method", ["swa", "atta-1", "te", "apart", "free"])
def test_a_state_can_be_loaded_before_the_first_call(method):
    """Saved again at once it is equal, and so are the weights to evaluate."""
    batch = tiny_batch()[:3]
    options = {"total_steps": 8, "steps_per_epoch": 2}
    options |= {"average_start": 0.25} if method == "swa" else {}
    options |= {"pad": 0} if method in ("atta-1", "apart") else {}
    whole = tiny_step(tiny_model(), method, **options)
    for _ in range(4):
        whole(*batch)
    saved = copy.deepcopy(whole.state_dict())
    model = twin(whole.model)
    resumed = tiny_step(model, method, **options)
    resumed.load_state_dict(saved)
    again = resumed.state_dict()
    assert again["parts"].keys() == saved["parts"].keys()
    for slot, state in saved["parts"].items():
        assert again["parts"][slot].keys() == state.keys()
        for name, tensor in state.items():
            assert torch.equal(again["parts"][slot][name], tensor), name
    with whole.evaluation_weights(), resumed.evaluation_weights():
        assert_same(whole.model, model, tolerance=0)


def test_an_epoch_that_ends_right_after_resuming_is_averaged():
    batch = tiny_batch()[:3]
    options = {"averaging": "swa", "average_start": 1, "steps": 1, "total_steps": None}
    steps = [tiny_step(tiny_model(), "pgd", **options)]
    for epoch in range(3):
        steps[0].set_epoch(epoch)
        steps[0](*batch)
    saved = copy.deepcopy(steps[0].state_dict())
    steps.append(tiny_step(twin(steps[0].model), "pgd", **options))
    steps[1].load_state_dict(saved)
    for step in steps:
        step.set_epoch(3)
    first, second = (step.plan.averaging.averaged() for step in steps)
    assert first
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
