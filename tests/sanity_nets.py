"""Small networks on the digits: honest ones, and wrappers that hide their gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import fastadv
from fastadv.data import load

EPS = 0.2
IMAGES = 100


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    data = load("digits")
    images = (data.train_images, data.test_images)
    train, test = (part.float() / 255 for part in images)
    return train, data.train_labels, test, data.test_labels


def batches(count: int = IMAGES) -> list[tuple[Tensor, Tensor]]:
    """The first ``count`` test images."""
    _, _, x, y = digits()
    return list(zip(x[:count].split(64), y[:count].split(64), strict=True))


def convolutions(width: int = 4) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, 2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 10),
    )


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def trained(make: Callable[[], nn.Module], method: str, epochs: int, **options: Any) -> nn.Module:
    """A network of ``make`` trained on the digits by a method of fastadv."""
    x, y, _, _ = digits()
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = make()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    step = fastadv.step(
        model, optimizer, method, eps=EPS, mode="eager", num_samples=len(x), **options
    )
    draws = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=draws).split(64):
            step(x[rows], y[rows], index=rows)
    return model.eval()


@cache
def honest(name: str) -> nn.Module:
    """One of ``HONEST``."""
    return HONEST[name]()


HONEST: dict[str, Callable[[], nn.Module]] = {
    "standard": lambda: trained(convolutions, "standard", 8),
    "pgd": lambda: trained(convolutions, "pgd", 8, steps=3),
    "trades": lambda: trained(convolutions, "trades", 8, steps=3),
    "linear": lambda: trained(linear, "fgsm", 8),
}


class Around(nn.Module):
    """``model`` with a function before and one behind it."""

    def __init__(
        self,
        model: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        behind: Callable[[Tensor], Tensor] = lambda logits: logits,
    ) -> None:
        super().__init__()
        self.model, self.before, self.behind = model, before, behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.model(self.before(x)))


def masked(name: str, base: str = "standard") -> nn.Module:
    """The network ``base``, with its gradient hidden in one of four ways."""
    model = honest(base)
    if name == "8 bits":
        return Around(model, before=lambda x: (x * 255).round() / 255)
    if name == "softmax":
        return Around(model, behind=lambda logits: (1e3 * logits).softmax(1))
    if name == "temperature":
        return Around(model, behind=lambda logits: 1e4 * logits)
    assert name == "random"
    return Around(model, before=lambda x: x + 0.2 * torch.randn_like(x))
