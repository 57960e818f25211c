"""Updates from several calls, and running statistics with a cumulative average."""

from __future__ import annotations

import torch
from tiny import assert_same, descend, sgd, tiny_batch, tiny_model, tiny_step
from torch import Tensor, nn
from torch.nn import functional

from fastadv.training.training_step import Step


def accumulating() -> Step:
    """Two updates of two calls each, with EMA."""
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), "pgd", steps=1, averaging="ema")
    for _ in range(2):
        step(x[:4], y[:4], index[:4], start=start[:4], update=False)
        step(x[4:], y[4:], index[4:], start=start[4:])
    return step


def test_a_weight_frozen_between_two_updates_does_not_change() -> None:
    """Its gradient of the previous update is gone, as after ``zero_grad``."""
    x, y, index, start = tiny_batch()
    model = tiny_model()
    step = tiny_step(model, "pgd", steps=1)
    step(x, y, index, start=start)
    model.conv2.weight.requires_grad_(False)
    before = model.conv2.weight.clone()
    step(x, y, index, start=start)
    assert torch.equal(model.conv2.weight, before)


def test_a_call_with_update_false_is_no_update() -> None:
    step = accumulating()
    assert step.calls == 2
    assert int(step.internals.offset) == 2  # all calls of an update draw the noise of one call


def test_the_average_is_updated_once_per_update() -> None:
    x, y, index, start = tiny_batch()
    model = tiny_model()
    step = tiny_step(model, "pgd", steps=1, averaging="ema")
    average = model.linear.weight.detach().clone()
    for update in range(2):
        step(x[:4], y[:4], index[:4], start=start[:4], update=False)
        step(x[4:], y[4:], index[4:], start=start[4:])
        decay = min(0.995, (1 + update) / (10 + update))
        average = decay * average + (1 - decay) * model.linear.weight.detach()
    with step.evaluation_weights():
        torch.testing.assert_close(model.linear.weight.detach(), average)


def test_batchnorm_takes_its_statistics_from_each_call() -> None:
    x, y, index, _ = tiny_batch()
    model, twin = tiny_model(), tiny_model()
    step, optimizer = tiny_step(model, "standard"), sgd(twin)
    for _ in range(2):
        loss = torch.zeros((), dtype=torch.float64)
        for part in (slice(0, 5), slice(5, 8)):
            step(x[part], y[part], index[part], update=part.stop == 8)
            loss = loss + functional.cross_entropy(twin(x[part]), y[part], reduction="sum") / 8
        descend(optimizer, loss)
    assert_same(model, twin)


class Cumulative(nn.Module):
    """``momentum=None``: running statistics are the mean over all batches so far."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


def test_cumulative_statistics_are_the_mean_of_all_batches() -> None:
    x, y, index, start = tiny_batch()
    model, other = Cumulative().double(), Cumulative().double()
    step = tiny_step(model, "fast", optimizer=sgd(model, lr=0.0))
    means = []
    other.norm.register_forward_pre_hook(lambda _, inputs: means.append(inputs[0].mean((0, 2, 3))))
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().clone()))
    step(x, y, index, start=start)
    step(x, y, index, start=start)
    for images in seen[-4:]:  # the passes before are the first call's look at the network
        other(images)
    assert int(model.norm.num_batches_tracked) == len(means) == 4
    torch.testing.assert_close(model.norm.running_mean, torch.stack(means).detach().mean(0))
