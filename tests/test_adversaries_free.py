"""Free-m against its loop written by hand, and properties of its perturbation."""

import copy

import pytest
import torch
from tiny import EPS, assert_same, descend, sgd, tiny_batch, tiny_model, tiny_step, twin
from tiny_capture import capture
from torch import Tensor, nn
from torch.nn import functional

from fastadv.errors import UserError
from fastadv.threat import Threat

REPLAYS = 2
MODES = ["eager", "captured", pytest.param("compiled", marks=pytest.mark.slow)]


def replay(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, delta: Tensor
) -> Tensor:
    """One replay: both gradients from one backward; returns the new delta of these rows."""
    delta = delta.clone().requires_grad_()
    descend(optimizer, functional.cross_entropy(model((x + delta).clamp(0, 1)), y))
    assert delta.grad is not None
    return (delta.detach() + EPS * delta.grad.sign()).clamp(-EPS, EPS)


def test_free_may_begin_at_the_image_for_every_batch() -> None:
    """delta in the box of its batch, as FastAT_Benchmark clips it."""
    model, other = tiny_model(), tiny_model()
    options = {"replays": 3, "box": "delta", "keep_delta": False}
    step, optimizer = tiny_step(model, "free", **options), sgd(other)
    for seed in range(3):
        x, y, index, _ = tiny_batch(seed=seed)
        step(x, y, index)
        x_adv = x
        for _ in range(3):
            x_adv = x_adv.detach().requires_grad_()
            loss = functional.cross_entropy(other(x_adv), y)
            descend(optimizer, loss)
            moved = x_adv.detach() + EPS * x_adv.grad.sign()
            x_adv = (x + (moved - x).clamp(-EPS, EPS)).clamp(0, 1)
    assert_same(model, other)


def test_three_batches_the_last_one_short() -> None:
    model = tiny_model()
    by_hand = twin(model)
    step = tiny_step(model, "free", replays=REPLAYS, box="image")
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
    step = tiny_step(tiny_model(), "free", replays=1, box="image")
    step(x, y, index, start=start)
    assert torch.equal(step.state["delta"], start)


def saturated(update: int) -> tuple[Tensor, Tensor, Tensor]:
    """x of which many pixels are 0 or 1, y and index."""
    x, y, index, _ = tiny_batch(seed=update)
    return (3 * x - 0.5).clamp(0, 1), y, index


def boxed_replay(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, delta: Tensor
) -> Tensor:
    """One replay of fast_adversarial's CIFAR-10 code, whose box is that of delta."""
    delta = delta.clone().requires_grad_()
    descend(optimizer, functional.cross_entropy(model(x + delta), y))
    assert delta.grad is not None
    moved = (delta.detach() + EPS * delta.grad.sign()).clamp(-EPS, EPS)
    return torch.minimum(torch.maximum(moved, 0 - x), 1 - x)


@pytest.mark.parametrize("mode", MODES)
def test_four_batches_with_the_box_of_delta(mode: str) -> None:
    model = tiny_model()
    by_hand = twin(model)
    made = "compiled" if mode == "compiled" else "eager"
    step = tiny_step(model, "free", mode=made, replays=REPLAYS, box="delta")
    if mode == "captured":
        capture(step)
    optimizer = sgd(by_hand)
    delta = torch.zeros_like(saturated(0)[0])
    left = 0
    for batch, count in enumerate((8, 8, 8, 5)):
        x, y, index = (each[:count] for each in saturated(batch))
        reached = x + delta[:count]
        left += int(((reached < 0) | (reached > 1)).sum())
        step(x, y, index)
        for _ in range(REPLAYS):
            delta[:count] = boxed_replay(by_hand, optimizer, x, y, delta[:count])
        torch.testing.assert_close(step.state["delta"], delta, rtol=0, atol=1e-12)
        inside = x + step.state["delta"][:count]
        assert inside.min() >= -1e-12
        assert inside.max() <= 1 + 1e-12
    assert left > 100  # the images left the box at the next batch
    assert_same(model, by_hand, 1e-12)


def test_the_box_of_delta_with_masks_and_a_radius_for_each_image() -> None:
    mask = torch.rand(8, 1, 6, 6, generator=torch.Generator().manual_seed(3)) > 0.5
    radii = torch.linspace(0.1, 0.8, 8, dtype=torch.float64)
    step = tiny_step(tiny_model(), "free", replays=3, box="delta", norm="l2", eps=0.5)
    for batch in range(3):
        x, y, index = saturated(batch)
        step(x, y, index, eps=radii, mask=mask)
        delta = step.state["delta"]
        assert not delta.masked_select(~mask.expand_as(delta)).any()
        assert (delta.flatten(1).norm(dim=1) <= radii * (1 + 1e-12)).all()
        assert (x + delta).min() >= -1e-12
        assert (x + delta).max() <= 1 + 1e-12
        assert delta.flatten(1).norm(dim=1).min() > 0.05


def test_the_box_of_delta_with_a_box_for_each_channel() -> None:
    """On normalised images the update is the one on images in [0,1]."""
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    threat = Threat.normalized(mean, std, eps=EPS)
    shift, scale = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std))
    outer, inner = tiny_model(), tiny_model()

    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner((x - shift) / scale)
            return found

    first = tiny_step(outer, "free", replays=REPLAYS, box="delta", threat=threat)
    second = tiny_step(Normalised(), "free", replays=REPLAYS, box="delta", num_classes=4)
    for batch in range(3):
        x, y, index = saturated(batch)
        first((x - shift) / scale, y, index)
        second(x, y, index)
    assert_same(outer, inner, 1e-10)


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


@pytest.mark.parametrize("box", ["image", "delta"])
def test_a_run_resumes_with_the_short_batch(box: str) -> None:
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), "free", replays=REPLAYS, box=box)
    step(x, y, index, start=start)
    model = twin(step.model)
    resumed = tiny_step(model, "free", replays=REPLAYS, box=box)
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
