"""Each pass has its own precision, BatchNorm mode and loss scale."""

from __future__ import annotations

import pytest
import torch
from tiny import assert_same, climb, descend, flat_step, sgd, tiny_batch, tiny_model, tiny_step
from torch import Tensor, nn
from torch.nn import functional

from fastadv.algorithms.contract import Context
from fastadv.algorithms.resolution import resolve
from fastadv.threat import Threat


@pytest.mark.parametrize(("attack", "outer"), [("bf16", False), ("fp32", True)])
def test_the_attacks_precision_ends_with_the_attack(
    attack: str, outer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastadv.engine.model.precision.cpu_multiplies", lambda _: True)
    model = tiny_model().float()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    plan, threat = resolve("pgd", {"steps": 2}), Threat("linf", 0.1)
    options = {"mode": "eager", "attack_dtype": attack, "amp": outer}
    step = flat_step(model, optimizer, plan, threat, **options)
    x, y, index, _ = tiny_batch()
    step(x.float(), y, index)
    seen: list[bool] = []
    model.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    step(x.float(), y, index)
    assert seen == [not outer, not outer, outer]


class Folds(nn.Module):
    """A BatchNorm behind a convolution, which an attack with running statistics folds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.norm(self.conv(x))).mean((2, 3)))


def test_an_attack_in_training_mode_folds_nothing() -> None:
    """Its BatchNorms use the batch's own statistics and update the running ones."""
    x, y, index, start = tiny_batch()
    model, by_hand = Folds().double(), Folds().double()
    step = tiny_step(model, "pgd", steps=2, alpha=0.04, attack_bn="train")
    step(x, y, index, start=start)
    assert len(step.internals.net.copies.folds) == 1
    optimizer = sgd(by_hand)
    x_adv = climb(by_hand, x, start, lambda z: functional.cross_entropy(z, y), 0.04, 2, "train")
    descend(optimizer, functional.cross_entropy(by_hand(x_adv), y))
    assert_same(model, by_hand)


def test_the_loss_scale_compensates_the_mean_over_the_batch() -> None:
    """float16 flushes the gradient of 1/B of a loss sooner the larger B is."""
    step = tiny_step(tiny_model(), "pgd")
    step.internals.net._dtype = torch.float16
    assert step.internals.net.loss_scale(64) == 64 * step.internals.net.loss_scale(1) > 64


def test_the_attack_maximises_the_scaled_loss() -> None:
    x, y, index, start = tiny_batch()
    step = tiny_step(tiny_model(), "pgd", steps=1)
    step(x, y, index, start=start)
    step.internals.net.loss_scale = lambda count: 100.0 * count
    logits = tiny_model()(x)
    expected = functional.cross_entropy(logits, y, reduction="sum") * 100
    torch.testing.assert_close(
        step.plan.adversary.setup.attack_loss(logits, y, Context()), expected
    )
