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
from torch._subclasses import FakeTensorMode

from fastadv import kernels
from fastadv.engine.noise import RESTART
from fastadv.evaluation.attacks.inputs import attacked_network
from fastadv.evaluation.search import known, square_moves, windows
from fastadv.evaluation.search.engine import Engine, waiting
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import Rows, joined
from fastadv.evaluation.search.search import Images, Seen, State
from fastadv.evaluation.search.square import Square
from fastadv.threat import Threat

CLASSES = 5
SEED = 3


class Rugged(nn.Module):
    """A float64 network whose margins have many local minima. Its sums are exact, so that no logit
    depends on the rest of the batch."""

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
        exact = torch.round(waves * 2**24) / 2**24
        return exact.flatten(2).sum(2) / exact[0, 0].numel() + self.lead


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


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (28, 20), (25, 40), (2, 3)], ids=str)
def test_sizes_of_the_released_code(size: tuple[int, int]) -> None:
    channels, (height, width) = 3, size
    published = SquareAttack(None, resc_schedule=False)
    linf, l2 = [], []
    for iteration in range(9000):
        pixels = published.p_selection(iteration) * (channels * height * width) / channels
        linf.append(min(max(round(pixels**0.5), 1), height, width))
        odd = max(round(pixels**0.5), 3)
        l2.append(min(odd + (odd % 2 == 0), height, width))
    shape = (channels, *size)
    assert windows.sizes(9000, shape) == linf
    assert windows.sizes(9000, shape, least=3, odd=True) == l2


@pytest.mark.parametrize("side", [1, 2, 3, 4, 7, 12])
def test_pattern_of_the_released_code(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    published = SquareAttack(None, norm="L2", device="cpu")
    monkeypatch.setattr(torch, "rand", torch.zeros)  # upright
    expected = published.eta(side).double()
    torch.testing.assert_close(windows.halves(side), expected, rtol=0, atol=1e-6)


NORMS = {"linf": 0.1, "l2": 0.6}


def mixed_case(
    norm: str, shape: tuple[int, int, int] = (1, 5, 5), count: int = 9, **settings: Any
) -> tuple[Square, Rugged, Images]:
    """A search in which some images are fooled, soon or late, and others are not."""
    model = Rugged(shape, lead=0.4)
    images = images_of(model, shape, list(range(7, 7 + count)), 0)
    return Square(Threat(norm, NORMS[norm]), SEED, **settings), model, images


RESULTS = ("fooled", "found", "margin", "strength", "segment")


@pytest.mark.parametrize("norm", NORMS)
def test_independent_of_batch_order_and_slots(norm: str) -> None:
    search, model, images = mixed_case(norm, steps=60, segments=2)
    whole = searched(search, model, images, slots=64)
    assert 0 < int(whole["fooled"].sum()) < 9
    assert int(whole["segment"].max()) == 1
    backwards = Images(*(values.flip(0) for values in images))
    for slots in (1, 3, 7):
        parts = searched(search, model, images, slots)
        turned = searched(search, model, backwards, slots)
        for name in RESULTS:
            assert torch.equal(whole[name], parts[name]), name
            assert torch.equal(whole[name], turned[name].flip(0)), name


@pytest.mark.parametrize("targeted", [False, True], ids=["any", "targeted"])
@pytest.mark.parametrize("norm", NORMS)
def test_points_that_are_passed_over_change_nothing(norm: str, targeted: bool) -> None:
    steps = 500 if norm == "linf" else 900
    model = Rugged((1, 5, 5), lead=-0.35 if targeted else 0.4)
    images = images_of(model, (1, 5, 5), list(range(12)), 0)
    threat = Threat(norm, NORMS[norm], targeted=targeted)
    every = searched(Square(threat, SEED, 2, steps, deterministic=False), model, images)
    asked, model.seen = len(model.seen), []
    new = searched(Square(threat, SEED, 2, steps), model, images)
    assert 0 < int(every["fooled"].sum()) < 12
    for name in RESULTS:
        assert torch.equal(every[name], new[name]), name
    assert len(model.seen) < (0.2 if norm == "linf" else 0.85) * asked


def test_no_point_is_asked_about_twice() -> None:
    """In Linf: and every point that the full search asked about is asked about once."""
    search, model, images = mixed_case("linf", count=1, steps=400)
    model.lead.data[0] = 2.0  # robust
    searched(search, model, images)
    asked = torch.stack(model.seen).flatten(1)
    model.seen.clear()
    searched(Square(search.threat, SEED, steps=400, deterministic=False), model, images)
    every = torch.stack(model.seen).flatten(1)
    assert len(every) == 401
    assert len(asked) == len(asked.unique(dim=0))
    assert torch.equal(asked.unique(dim=0), every.unique(dim=0))


@pytest.mark.parametrize("shape", [(3, 6, 6), (1, 4, 9), (3, 9, 4), (2, 3, 3), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_points_are_in_ball_and_box(norm: str, shape: tuple[int, int, int]) -> None:
    search, model, images = mixed_case(norm, shape, count=1, steps=300)
    model.lead.data[0] = 3.0
    searched(search, model, images)
    asked = torch.stack(model.seen)
    away = asked - images.x
    length = away.abs().amax((1, 2, 3)) if norm == "linf" else away.flatten(1).norm(dim=1)
    eps = NORMS[norm]
    assert float(length.max()) <= eps * (1 + 1e-12)
    assert float(length[0]) > 0.3 * eps
    assert float(asked.min()) >= 0
    assert float(asked.max()) <= 1
    changed = (asked[1:] != asked[0]).flatten(1).any(1)
    assert int(changed.sum()) > 1


def test_draws() -> None:
    """A window lies everywhere but at the last place, all places and signs equally often; every
    image has its own."""
    sides = [2] * 4000 + [5] * 10
    drawn = windows.Windows(sides, (6, 5), 2, bits=26)
    draws = drawn.draw(torch.tensor([4, 9]), 1, 7, 68)
    for window in (0, 1):
        top, left = drawn.top(draws, window), drawn.left(draws, window)
        for place, room in ((top, 4), (left, 3)):
            counts = place[:, :4000].flatten().bincount(minlength=6)
            assert int(counts[room:].sum()) == 0
            assert (counts[:room] / 8000 - 1 / room).abs().max() < 0.02
        assert int(top[:, 4000:].max()) == 0  # 6 - 5 = 1 place
        assert int(left[:, 4000:].max()) == 0
        assert not torch.equal(top[0], top[1])
    bits = drawn.bits(draws, 26)
    assert bits.shape == (2, 4010, 26)
    assert set(bits.unique().tolist()) == {0, 1}
    assert (bits.float().mean((0, 1)) - 0.5).abs().max() < 0.03
    agree = (bits.flatten(0, 1).T.float() * 2 - 1) @ (bits.flatten(0, 1).float() * 2 - 1) / 8020
    assert (agree - torch.eye(26)).abs().max() < 0.05  # independent bits


def test_linf_name_is_that_of_the_point() -> None:
    """Proposals of one image have the same name where they are the same point, whether of the best
    point now or of one before, and the best point's name is that of its own proposal."""
    search, _, images = mixed_case("linf", (2, 4, 4), count=1, steps=300)
    moves = search._moves_for(images.x)
    state = search.start(images, 0) | {"x": images.x, "y": images.y}
    numbers = torch.arange(300)
    points, names = [state["best"]], [state["best_name"]]
    for _ in range(3):
        for number in numbers:
            points.append(moves.point(state, state["best"], number[None]))
        names.append(moves.names(state, torch.zeros(1, dtype=torch.int64), numbers[None])[0])
        chosen = int(numbers[torch.randint(300, (1,), generator=torch.Generator().manual_seed(2))])
        better, name = torch.tensor([True]), names[-1][chosen : chosen + 1]
        best = moves.point(state, state["best"], torch.tensor([chosen]))
        state = state | moves.accepted(state, best, better, name) | {"best": best}
    _, point_class = torch.cat(points).flatten(1).unique(dim=0, return_inverse=True)
    _, name_class = torch.cat(names).unique(return_inverse=True)
    pairs = torch.stack([point_class, name_class], 1).unique(dim=0)
    assert len(pairs) == int(point_class.max()) + 1 == int(name_class.max()) + 1
    assert len(pairs) > 60


def test_set_of_names() -> None:
    sets = known.empty(2, torch.device("cpu"))
    names = known.mixed(torch.arange(200).reshape(2, 100) - 100)
    rows = torch.arange(2)
    assert len(names.unique()) == 200
    assert not bool(known.contains(names, sets, rows).any())
    places = torch.arange(known.PLACES).expand(2, -1)
    assert not bool(known.contains(places, sets, rows).any())
    for name in names.unbind(1):
        known.add(name, sets)
    assert (
        float(known.contains(names, sets, rows).float().mean()) > 0.95
    )  # the others were pushed out
    assert not bool(known.contains(names.flip(0), sets, rows).any())
    assert torch.equal(
        known.contains(names[1:], sets, rows[1:]), known.contains(names, sets, rows)[1:]
    )


@pytest.mark.parametrize("norm", NORMS)
def test_on_a_device_nothing_is_read(norm: str) -> None:
    """``tell`` as it is on a device: no value is read, and the result is the same."""
    search, model, images = mixed_case(norm, steps=400)
    expected = searched(search, model, images)
    asked, model.seen = len(model.seen), []
    search = Square(search.threat, SEED, steps=400)
    search._moves_for(images.x).reads_are_free = False
    result = searched(search, model, images)
    for name in RESULTS:
        assert torch.equal(expected[name], result[name]), name
    assert asked <= len(model.seen) < 1.1 * asked + 9 * (400 // 128 + 1)

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = Images(*(mode.from_tensor(values) for values in images))
        state: State = search.start(fake, 0) | {"x": fake.x, "y": fake.y}
        wrong = torch.zeros(9, dtype=torch.bool)
        told = search.tell(state, Seen(fake.logits, fake.logits[:, 0], fake.x, wrong))
    for name, values in told.items():
        assert values.shape == state.get(name, wrong).shape, name
        assert values.dtype == state.get(name, wrong).dtype, name


def test_large_images_have_no_names_in_l2() -> None:
    search = Square(Threat("l2", 1.0), SEED, steps=30)
    moves = search._moves_for(torch.zeros(1, 30, 64, 64))
    assert not moves.names_are_exact
    assert "known" not in search.start(images_of_size(30, 64), 0)


def images_of_size(channels: int, side: int) -> Images:
    x = torch.full((1, channels, side, side), 0.5)
    return Images(x, torch.tensor([0]), torch.tensor([3]), torch.zeros(1, CLASSES))


@pytest.mark.parametrize("norm", NORMS)
def test_an_equal_point_is_not_better(norm: str) -> None:
    """On a flat network every proposal changes the start, in one window or two."""
    search, model, images = mixed_case(norm, (1, 9, 9), count=1, steps=40, deterministic=False)
    model.weight.data.zero_()
    model.lead.data[0] = 5.0
    state = search.start(images, 0) | {"x": images.x, "y": images.y}
    start = state["best"]
    for _ in range(40):
        logits = model(state["point"]).detach()
        wrong = torch.tensor([False])
        state = state | search.tell(state, Seen(logits, logits[:, 0], images.x, wrong))
        assert torch.equal(state["best"], start)
