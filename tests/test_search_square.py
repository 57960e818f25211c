"""The Square attack against the released code on the same draws, its independence of batches, and
the queries that it passes over."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pyautoattack.square import SquareAttack
from torch import Tensor, nn

from fastadv import kernels
from fastadv.engine.noise import RESTART
from fastadv.evaluation.attacks.inputs import attacked_network
from fastadv.evaluation.search import square_moves
from fastadv.evaluation.search.engine import Engine, waiting
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import Rows, joined
from fastadv.evaluation.search.search import Images
from fastadv.evaluation.search.square import Square
from fastadv.threat import Threat

CLASSES = 5
SEED = 3


class Rugged(nn.Module):
    """A float64 network without products of batches, so that no logit depends on the batch; its
    margins have many local minima."""

    def __init__(self, shape: tuple[int, int, int], lead: float) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        size = (CLASSES, *shape)
        self.weight = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
        self.phase = nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64))
        self.lead = nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64))
        with torch.no_grad():
            self.lead[0] = lead
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.detach().clone()
        waves = torch.sin(9 * x[:, None] * self.weight + self.phase)
        return torch.stack([image.flatten(1).mean(1) for image in waves]) + self.lead


def images_of(model: Rugged, shape: tuple[int, int, int], rows: list[int], target: int) -> Images:
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(40, *shape, generator=generator, dtype=torch.float64)
    x = (1.4 * x - 0.2).clamp(0, 1)[rows]  # some pixels at the ends of the box
    logits = model(x).detach()
    model.seen.clear()
    return Images(x, torch.full((len(x),), target), torch.tensor(rows), logits)


def searched(search: Square, model: Rugged, images: Images, slots: int = 64) -> Rows:
    """The results in the order of ``images``; ``model.seen`` has the points."""
    passes = Passes(attacked_network(model, torch.device("cpu"), False))
    place = torch.arange(len(images.x))
    rows = waiting(images, place, targeted=search.threat.targeted)
    with passes:
        results = joined(Engine(search, passes, slots).run(iter([rows])))
    order = results["place"].argsort()
    return {name: values[order] for name, values in results.items()}


class Published(SquareAttack):
    """The released attack on one image, with the numbers that ours draws for it."""

    def use(self, search: Square, index: int, segment: int = 0) -> None:
        key = (SEED, square_moves.NOISE.shift + segment * RESTART, square_moves.NOISE.number)
        self.numbers = unit_numbers(search, index, key)

    def random_int(self, low: int = 0, high: int = 1, shape: Any = (1,)) -> Tensor:
        return (low + (high - low) * next(self.numbers)).long()

    def random_choice(self, shape: Any) -> Tensor:
        signs = [next(self.numbers) for _ in range(math.prod(shape))]
        return torch.stack(signs).double().view(shape)

    def eta(self, s: int) -> Tensor:
        self.turn = next(self.numbers)
        return super().eta(s)


def unit_numbers(search: Square, index: int, key: tuple[int, int, int]) -> Iterator[Tensor]:
    """Uniform numbers for places, signs -1 or 1 and uniform numbers for the turn of a pattern, in
    the order in which the released code asks for them."""
    rows, (seed, offset, stream) = torch.tensor([index]), key
    channels, height, width = search._moves.shape
    linf = search.threat.norm == "linf"

    def drawn(shape: tuple[int, ...], offset: int) -> Tensor:
        return (kernels.noise_uniform(rows, shape, seed, offset, stream)[0] + 1) / 2

    if linf:
        yield from drawn((channels, 1, width), offset).flatten().sub(0.5).add(1e-9).sign()
    else:
        side = max(height // 5, 1)
        grid = drawn((channels + 1, height // side, width // side), offset).flatten(1)
        for tile in grid.unbind(1):
            yield tile[channels]
            yield from tile[:channels].sub(0.5).add(1e-9).sign()
    places = 2 if linf else 4
    for numbers in drawn((search.steps, places + 1), offset + 1):
        bits = int(numbers[places] * 2**24)
        signs = [torch.tensor(2.0 * (bits >> channel & 1) - 1) for channel in range(channels)]
        yield from numbers[:places]
        if not linf:
            yield torch.tensor(float(bits >> channels & 1))
        yield from signs


SHAPES = ((1, 8, 8), (3, 9, 9), (1, 7, 7), (3, 8, 8), (3, 10, 12), (1, 15, 10))


@pytest.mark.parametrize("targeted", [False, True], ids=["any", "targeted"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_published_arithmetic(
    norm: str, shape: tuple[int, int, int], targeted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every point that is asked about is the released code's."""
    queries, row = 260, 11
    model = Rugged(shape, lead=-1.0 if targeted else 1.0)
    threat = Threat(norm, 0.1 if norm == "linf" else 0.8, targeted=targeted)
    search = Square(threat, SEED, steps=queries, deterministic=False)
    images = images_of(model, shape, [row], 0)
    searched(search, model, images)
    own = torch.stack(model.seen)

    published = Published(
        model,
        norm={"linf": "Linf", "l2": "L2"}[norm],
        n_queries=queries,
        eps=threat.nominal,
        targeted=targeted,
        resc_schedule=False,
    )
    published.use(search, row)
    published.init_hyperparam(images.x)
    default = torch.get_default_dtype()
    monkeypatch.setattr(torch, "rand", lambda shape: published.turn.reshape(shape))
    torch.set_default_dtype(torch.float64)
    try:
        model.seen.clear()
        published.attack_single_run(images.x, images.y)
    finally:
        torch.set_default_dtype(default)
    expected = torch.stack(model.seen)
    assert len(own) == queries + 1
    torch.testing.assert_close(own, expected, rtol=0, atol=1e-12)
    assert len(own.flatten(1).unique(dim=0)) > 20
