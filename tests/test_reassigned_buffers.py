"""Buffers that a forward pass reassigns are restored like those it changes in place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_capture import DeviceNetwork, capture
from torch import Tensor, nn

import fastadv


class Norm(nn.Module):
    """A home-made BatchNorm; ``anew``: its statistics are other tensors after each pass."""

    def __init__(self, channels: int, anew: bool) -> None:
        super().__init__()
        self.anew = anew
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.mean[:, None, None]) / (self.variance[:, None, None] + 1e-5).sqrt()
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        with torch.no_grad():
            now = 0.9 * self.mean + 0.1 * mean, 0.9 * self.variance + 0.1 * variance
            if self.anew:
                self.mean, self.variance = now
            else:
                self.mean.copy_(now[0])
                self.variance.copy_(now[1])
        return (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()


def network(anew: bool) -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3), Norm(4, anew), nn.Softplus(), nn.Conv2d(4, 4, 3), Norm(4, anew)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)).double()


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.arange(6) % 4, torch.arange(6)


CASES: dict[str, dict[str, Any]] = {
    "awp": {},
    "rwp": {},
    "pgd": {"restarts": 2, "steps": 2},
    "trades-awp": {"warmup_epochs": 0, "steps": 2},
    "fgsm-n-gradalign": {},
    "pgd-logitalign": {"steps": 2},
    "swa": {"average_start": 0, "steps": 1},
}


def trained(anew: bool, method: str, mode: str, *, not_finite: bool) -> fastadv.Step:
    model = network(anew)
    step = fastadv.step(
        model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), method, mode="eager",
        eps=0.1, total_steps=9, steps_per_epoch=1, **CASES[method],
    )  # fmt: skip
    if mode == "device":
        step.internals.net.__class__ = DeviceNetwork
    if mode == "captured":
        capture(step)
    for seed in range(3):
        step(*batch(seed))
    if not_finite:
        x, y, index = batch(3)
        x[0, 0, 0, 0] = float("nan")
        step(x, y, index)
        step(*batch(4))
    return step


@pytest.mark.parametrize("not_finite", [False, True])
@pytest.mark.parametrize("mode", ["eager", "device", "captured"])
@pytest.mark.parametrize("method", CASES)
def test_reassigned_buffers_are_restored_like_those_changed_in_place(
    method: str, mode: str, not_finite: bool
) -> None:
    steps = [trained(anew, method, mode, not_finite=not_finite) for anew in (False, True)]
    states = [step.model.state_dict() for step in steps]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
        assert value.isfinite().all(), name
    if method == "swa" and not not_finite:
        inside = []
        for step in steps:
            with step.evaluation_weights([batch(5)[0]]):
                inside.append(step.model.state_dict()["1.mean"].clone())
        assert torch.equal(*inside)
        assert torch.equal(steps[1].model.state_dict()["1.mean"], states[0]["1.mean"])
