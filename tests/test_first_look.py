"""The first call probes the model with two images, which leaves its modules as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import CLASSES, EPS, climb, descend, sgd, tiny_batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastadv
from fastadv.errors import UserError

ALPHA = 0.05


class _Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 6 * 6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.seen(x).flatten(1))

    def seen(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ScaledByItsFirstBatch(_Around):
    """A parameter that the first forward fills, as ActNorm's."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.done = False

    def seen(self, x: Tensor) -> Tensor:
        if not self.done:
            self.scale.data = (1 / x.std((0, 2, 3))).detach().view(3, 1, 1)
            self.done = True
        return x * self.scale


class FilledInPlace(ScaledByItsFirstBatch):
    def seen(self, x: Tensor) -> Tensor:
        if not self.done:
            self.scale.data.copy_((1 / x.std((0, 2, 3))).detach().view(3, 1, 1))
            self.done = True
        return x * self.scale


class MeanOfItsFirstBatch(_Around):
    mean: Any = None

    def seen(self, x: Tensor) -> Tensor:
        if self.mean is None:
            self.mean = x.mean(0).detach()
        return x - self.mean


class RoomForItsFirstBatch(_Around):
    room: Any = None

    def seen(self, x: Tensor) -> Tensor:
        if self.room is None:
            self.room = torch.full((len(x), 1, 1, 1), 0.5, dtype=x.dtype)
        return x + self.room


class Counts(_Around):
    """A module that stores the number of its calls, as a number and as a list."""

    def __init__(self) -> None:
        super().__init__()
        self.times, self.passes = 0, []

    def seen(self, x: Tensor) -> Tensor:
        self.times += 1
        self.passes.append(len(x))
        return x / self.times


KINDS = [ScaledByItsFirstBatch, FilledInPlace, MeanOfItsFirstBatch, RoomForItsFirstBatch, Counts]


def _made(kind: Any) -> Any:
    torch.manual_seed(0)
    return kind().double()


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_forward_is_that_of_the_batch(kind: Any) -> None:
    x, y, index, start = tiny_batch()
    model, other = _made(kind), _made(kind)
    options = {"eps": EPS, "alpha": ALPHA, "steps": 2, "mode": "eager"}
    step = fastadv.step(model, sgd(model), "pgd", **options)
    optimizer = sgd(other)
    for _ in range(2):
        step(x, y, index, start=start)
        x_adv = climb(other, x, start, lambda z: cross_entropy(z, y), ALPHA, 2, "train")
        descend(optimizer, cross_entropy(other.train()(x_adv), y))
    for name, value in model.state_dict().items():
        assert torch.allclose(value, other.state_dict()[name], rtol=0, atol=1e-12), name
    if kind is Counts:
        assert (model.times, model.passes) == (other.times, other.passes)


def test_a_refused_first_call_does_not_initialise_the_model() -> None:
    x, y, index, _ = tiny_batch()
    model = _made(ScaledByItsFirstBatch)
    step = fastadv.step(model, sgd(model), "pgd", eps=EPS, mode="eager")
    with pytest.raises(UserError):
        step(x, y + 100, index)
    assert not model.done
    assert (model.scale == 1).all()
