"""Free-m against its loop written by hand, and properties of its perturbation."""

import copy

import pytest
import torch
from tiny import EPS, assert_same, descend, sgd, tiny_batch, tiny_model, tiny_step, twin
from torch import Tensor, nn
from torch.nn import functional

from fastadv.errors import UserError

REPLAYS = 2


def replay(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, delta: Tensor
) -> Tensor:
    """One replay: both gradients from one backward; returns the new delta of these rows."""
    delta = delta.clone().requires_grad_()
    descend(optimizer, functional.cross_entropy(model((x + delta).clamp(0, 1)), y))
    assert delta.grad is not None
    return (delta.detach() + EPS * delta.grad.sign()).clamp(-EPS, EPS)


def test_three_batches_the_last_one_short() -> None:
    model = tiny_model()
    by_hand = twin(model)
    step = tiny_step(model, "free", replays=REPLAYS)
    optimizer = sgd(by_hand)
    x, y, index, start = tiny_batch()
    delta = start.clone()
    for batch, count in enumerate((8, 8, 5)):
        x, y, index, _ = tiny_batch(seed=batch)
        x, y, index = x[:count], y[:count], index[:count]
        step(x, y, index, start=start if batch == 0 else None)
        for _ in range(REPLAYS):
            delta[:count] = replay(by_hand, optimizer, x, y, delta[:count])
        torch.testing.assert_close(step.state["delta"], delta)
    assert_same(model, by_hand)


def test_delta_starts_at_zero_and_reaches_the_border_in_one_step() -> None:
    x, y, index, _ = tiny_batch()
    x = 0.2 + 0.6 * x
    model = tiny_model()
    clean = functional.cross_entropy(twin(model)(x), y)
    step = tiny_step(model, "free", replays=1)
    metrics = step(x, y, index)
    torch.testing.assert_close(metrics["loss"], clean.detach())
    assert torch.equal(step.state["delta"].abs(), torch.full_like(x, EPS))


def test_an_element_clipped_to_the_box_has_no_gradient() -> None:
    x, y, index, _ = tiny_batch()
    x = torch.ones_like(x)
    start = torch.full_like(x, EPS / 2)
    step = tiny_step(tiny_model(), "free", replays=1)
    step(x, y, index, start=start)
    assert torch.equal(step.state["delta"], start)


def test_replays_count_as_updates() -> None:
    seen: list[int] = []
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "free", replays=3, before_update=seen.append)
    step(x, y, index)
    step(x, y, index)
    assert step.updates_per_batch == 3
    assert seen == [0, 1, 2, 3, 4, 5]
    assert int(step.internals.offset) == 6


def test_in_l2_delta_stays_in_its_ball() -> None:
    x, y, index, _ = tiny_batch()
    step = tiny_step(tiny_model(), "free", replays=3, norm="l2", eps=0.5)
    step(0.3 + 0.4 * x, y, index)
    lengths = step.state["delta"].flatten(1).norm(dim=1)
    assert lengths.max() <= 0.5 + 1e-9
    assert lengths.min() > 0.4


def test_a_run_resumes_with_the_short_batch() -> None:
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), "free", replays=REPLAYS)
    step(x, y, index, start=start)
    model = twin(step.model)
    resumed = tiny_step(model, "free", replays=REPLAYS)
    momenta = copy.deepcopy(step.optimizer.state_dict())
    resumed.optimizer.load_state_dict(momenta)
    resumed.load_state_dict(copy.deepcopy(step.state_dict()))
    for one in (step, resumed):
        one(x[:3], y[:3], index[:3])
        one(x, y, index)
    assert torch.equal(step.state["delta"], resumed.state["delta"])
    assert_same(step.model, model, tolerance=0)


def test_unsupported_settings_are_refused() -> None:
    x, y, index, _ = tiny_batch()
    with pytest.raises(UserError, match="update=False"):
        tiny_step(tiny_model(), "free")(x, y, index, update=False)
    with pytest.raises(UserError, match="replays"):
        tiny_step(tiny_model(), "free", replays=0)
    with pytest.raises(UserError, match="attack_bn"):
        tiny_step(tiny_model(), "free", attack_bn="eval")  # there is no attack besides the pass
