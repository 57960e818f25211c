"""SWA and EMA against their formulas; they do not change training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import assert_same, tiny_batch, tiny_model, tiny_step, twin
from tiny_capture import capture
from tiny_staged import staged_model, staged_step
from torch import Tensor, nn

from fastadv.errors import UserError
from fastadv.training.training_step import Step

ATTACK: dict[str, Any] = {"steps": 1}


def run(step: Step, calls: int) -> list[dict[str, Tensor]]:
    """The weights after each call, on changing batches."""
    found = []
    for seed in range(calls):
        x, y, index, start = tiny_batch(seed=seed)
        step(x, y, index % 12, start=start)
        found.append({n: p.detach().clone() for n, p in step.model.named_parameters()})
    return found


def evaluated(step: Step, batches: Any = None) -> dict[str, Tensor]:
    with step.evaluation_weights(batches):
        return copy.deepcopy(step.model.state_dict())


def test_swa_is_the_mean_of_the_weights_at_the_ends_of_epochs() -> None:
    step = staged_step(staged_model(), "swa", average_start=1, steps_per_epoch=2, **ATTACK)
    weights = run(step, 8)
    ends = [weights[3], weights[5], weights[7]]  # epochs 1, 2 and 3
    found = evaluated(step)
    for name in ends[0]:
        torch.testing.assert_close(found[name], sum(end[name] for end in ends) / 3)
    assert int(step.state["average_count"]) == 3


def test_swa_every_second_epoch() -> None:
    options = {"average_start": 1, "average_every": 2, "steps_per_epoch": 1}
    step = staged_step(staged_model(), "swa", **options, **ATTACK)
    weights = run(step, 5)
    found = evaluated(step)
    for name in weights[0]:
        torch.testing.assert_close(found[name], (weights[1][name] + weights[3][name]) / 2)


def test_before_the_first_average_the_live_weights_are_evaluated() -> None:
    step = staged_step(staged_model(), "swa", average_start=3, steps_per_epoch=2, **ATTACK)
    weights = run(step, 4)
    assert all(torch.equal(evaluated(step)[name], weights[-1][name]) for name in weights[0])


def test_swa_starts_at_a_fraction_of_the_run() -> None:
    run_of = {"total_steps": 8, "steps_per_epoch": 2, "average_start": 0.5}
    step = staged_step(staged_model(), "swa", **run_of, **ATTACK)
    run(step, 5)
    assert int(step.state["average_count"]) == 0
    run(step, 1)
    assert int(step.state["average_count"]) == 1  # the end of epoch 2 of 4


def test_ema_equals_its_recursion() -> None:
    model = staged_model()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = staged_step(model, "pgd", averaging="ema", average_decay=0.25, **ATTACK)
    weights = run(step, 4)
    for update, now in enumerate(weights):
        decay = min(0.25, (1 + update) / (10 + update))
        for name, tensor in expected.items():
            expected[name] = decay * tensor + (1 - decay) * now[name]
    found = evaluated(step)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert not torch.allclose(found["linear.weight"], weights[-1]["linear.weight"])


PUBLISHED: dict[str, Any] = {"averaging": "ema", "average_warmup": False, "average_buffers": True}


def whole_state(step: Step, calls: int) -> list[dict[str, Tensor]]:
    """The floating-point state of the model after each call."""
    states = []
    for seed in range(calls):
        x, y, index, start = tiny_batch(seed=seed)
        step(x, y, index % 12, start=start)
        found = step.model.state_dict().items()
        states.append({n: t.clone() for n, t in found if t.is_floating_point()})
    return states


@pytest.mark.parametrize("captured", [False, True])
def test_ema_of_the_whole_state_begins_as_that_after_the_first_update(captured: bool) -> None:
    step = staged_step(staged_model(), "pgd", **PUBLISHED, average_decay=0.75, **ATTACK)
    states = whole_state(capture(step) if captured else step, 4)
    expected = states[0]
    for now in states[1:]:
        expected = {name: 0.75 * t + 0.25 * now[name] for name, t in expected.items()}
    assert "bn.running_var" in expected
    # Statistics that are averaged are not estimated again.
    found = evaluated(step, [tiny_batch(seed=5)[0]])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=0, msg=name)
    assert not torch.allclose(found["bn.running_var"], states[-1]["bn.running_var"])
    for name, tensor in states[-1].items():
        assert torch.equal(step.model.state_dict()[name], tensor), name


def test_ema_at_the_ends_of_epochs() -> None:
    options = PUBLISHED | {"average_decay": 0.75, "average_at": "epoch", "steps_per_epoch": 2}
    step = staged_step(staged_model(), "pgd", **options, **ATTACK)
    states = whole_state(step, 7)
    expected = states[1]
    for now in (states[3], states[5]):
        expected = {name: 0.75 * t + 0.25 * now[name] for name, t in expected.items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(evaluated(step)[name], tensor, rtol=1e-12, atol=0, msg=name)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("start", [2, 0.5])
def test_ema_from_an_epoch_on(start: float, captured: bool) -> None:
    """Until then the live network is evaluated."""
    options = PUBLISHED | {"average_decay": 0.75, "average_start": start}
    options |= {"steps_per_epoch": 2, "total_steps": 8}
    step = staged_step(staged_model(), "pgd", **options, **ATTACK)
    step = capture(step) if captured else step
    states = whole_state(step, 3)
    for name, tensor in states[-1].items():
        assert torch.equal(evaluated(step)[name], tensor), name
    x, y, index, begin = tiny_batch(seed=7)
    for _ in range(3):  # the last one of epoch 1, and epoch 2
        step(x, y, index % 12, start=begin)
        found = step.model.state_dict().items()
        states.append({n: t.clone() for n, t in found if t.is_floating_point()})
    expected = {name: 0.75 * t + 0.25 * states[5][name] for name, t in states[4].items()}
    for name, tensor in expected.items():
        torch.testing.assert_close(evaluated(step)[name], tensor, rtol=1e-12, atol=0, msg=name)


def test_an_average_of_epochs_needs_to_know_them() -> None:
    step = staged_step(
        staged_model(), "pgd", averaging="ema", average_at="epoch", steps_per_epoch=None, **ATTACK
    )
    x, y, index, start = tiny_batch()
    with pytest.raises(UserError, match="follows the epochs"):
        step(x, y, index % 12, start=start)


@pytest.mark.parametrize("captured", [False, True])
def test_an_update_that_does_not_count_leaves_the_average(captured: bool) -> None:
    """Statistics that are not finite must not reach it, nor begin it."""
    step = staged_step(staged_model(), "pgd", **PUBLISHED, average_decay=0.75, **ATTACK)
    step = capture(step) if captured else step
    whole_state(step, 2)
    before = {name: tensor.clone() for name, tensor in step.state.items()}
    x, y, index, start = tiny_batch(seed=9)
    with torch.no_grad():
        step.model.conv1.weight[0] = 1e200  # finite, and its variance is not
    step(x, y, index % 12, start=start)
    assert not step.healthy()
    for name, tensor in step.state.items():
        assert torch.equal(tensor, before[name]), name


def test_averages_of_buffers_are_resumed_and_follow_their_modules() -> None:
    options = PUBLISHED | {"average_decay": 0.75}
    step = staged_step(staged_model(), "pgd", **options, **ATTACK)
    whole_state(step, 2)
    other = staged_step(twin(step.model), "pgd", **options, **ATTACK)
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    other.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict()))
    for each in (step, other):
        whole_state(each, 2)
    found, again = evaluated(step), evaluated(other)
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name]), name
    layer1, layer2 = step.model.layer1, step.model.layer2
    step.model.layer1, step.model.layer2 = layer2, layer1
    swapped = evaluated(step)
    name = "0.bn1.running_mean"
    assert torch.equal(swapped[f"layer1.{name}"], found[f"layer2.{name}"])
    assert torch.equal(swapped[f"layer2.{name}"], found[f"layer1.{name}"])
    plain = staged_step(staged_model(), "pgd", averaging="ema", **ATTACK)
    with pytest.raises(UserError, match="another model"):
        plain.load_state_dict(step.state_dict())


def test_a_buffer_that_is_not_saved_is_not_averaged() -> None:
    model = staged_model()
    model.register_buffer("scratch", torch.zeros(3).double(), persistent=False)
    step = staged_step(model, "pgd", **PUBLISHED, **ATTACK)
    whole_state(step, 1)
    assert "average.bn.running_mean" in step.state
    assert "average.scratch" not in step.state


@pytest.mark.parametrize("averaging", ["swa", "ema"])
def test_averaging_does_not_change_training(averaging: str) -> None:
    models = [staged_model(), staged_model()]
    run(staged_step(models[0], "pgd", averaging=averaging, **ATTACK), 6)
    run(staged_step(models[1], "pgd", **ATTACK), 6)
    assert_same(*models, tolerance=0)


@pytest.mark.parametrize("averaging", ["swa", "ema"])
def test_evaluation_leaves_the_model_as_it_was(averaging: str) -> None:
    step = staged_step(staged_model(), "pgd", averaging=averaging, **ATTACK)
    run(step, 6)
    before = copy.deepcopy(step.model.state_dict())
    flags = [module.training for module in step.model.modules()]
    evaluated(step, [tiny_batch()[0]])
    for name, tensor in step.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert flags == [module.training for module in step.model.modules()]


def test_statistics_are_estimated_for_the_average() -> None:
    """Statistics are means over all batches, without momentum, of the averaged network."""
    step = staged_step(staged_model(), "swa", average_start=0, steps_per_epoch=1, **ATTACK)
    run(step, 3)
    batches = [tiny_batch(seed=seed)[0] for seed in (5, 6)]
    found = evaluated(step, batches)
    averaged = twin(step.model)
    averaged.load_state_dict(evaluated(step))
    entering: list[Tensor] = []

    def note(module: nn.Module, inputs: tuple[Tensor]) -> None:
        entering.append(inputs[0].detach())

    averaged.layer1[0].bn1.register_forward_pre_hook(note)
    for x in batches:
        averaged(x)
    means = torch.stack([t.mean((0, 2, 3)) for t in entering]).mean(0)
    torch.testing.assert_close(found["layer1.0.bn1.running_mean"], means)


def test_meaningless_options_are_refused() -> None:
    with pytest.raises(UserError, match="average_decay"):
        staged_step(staged_model(), "pgd", averaging="ema", average_decay=1.0)
    x, y, index, _ = tiny_batch()
    with pytest.raises(UserError, match="average_start="):
        staged_step(staged_model(), "swa", total_steps=None)(x, y, index % 12)


def test_a_fraction_that_ends_inside_an_epoch_starts_with_that_epoch() -> None:
    x, y, index, start = tiny_batch()
    known = {"steps": 1, "total_steps": 10, "steps_per_epoch": 2, "average_start": 0.75}
    step = tiny_step(tiny_model(), averaging="swa", **known)
    step(x, y, index, start=start)
    assert step.plan.averaging.first_epoch() == 3  # 0.75 of 5 epochs is 3.75


def test_a_fraction_is_the_epoch_that_it_is_on_paper() -> None:
    """0.29 * 100 is 28.999999999999996."""
    x, y, index, start = tiny_batch()
    known = {"steps": 1, "total_steps": 100, "steps_per_epoch": 1, "average_start": 0.29}
    step = tiny_step(tiny_model(), averaging="swa", **known)
    step(x, y, index, start=start)
    assert step.plan.averaging.first_epoch() == 29
