"""The engine of searches: full batches, one result per image, whatever runs beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastadv.engine.compiled import Runner
from fastadv.engine.model.network import Network
from fastadv.evaluation.search import cascade
from fastadv.evaluation.search.apgd import ApgdCe, ApgdT, periods
from fastadv.evaluation.search.cascade import Pipeline, Stage
from fastadv.evaluation.search.engine import Engine
from fastadv.evaluation.search.fixed import FixedEngine
from fastadv.evaluation.search.losses import lead
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.rows import Buffer, Rows, count, joined
from fastadv.evaluation.search.search import Images, Search, Seen, State
from fastadv.threat import Threat

COUNT = 23
STEPS = 12
EPS = 0.08


class Counted(nn.Module):
    """A small network in float64 that notes the size of each of its batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(100, 5)
        ).double()
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.sizes.append(len(x))
        return self.layers(x)


def problem() -> tuple[Counted, Images]:
    model = Counted().eval()
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(COUNT, 2, 5, 5, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = model(x)
    y = logits.argmax(1)
    y[3] = (y[3] + 1) % 5  # wrong without an attack
    return model, Images(x, y, torch.arange(COUNT) * 7, logits)


def entering(images: Images) -> Rows:
    return cascade.entering(images, torch.arange(COUNT), targeted=False)


def passes_of(model: nn.Module, fast: nn.Module | None = None) -> Passes:
    networks = [
        None if m is None else Network(m, torch.device("cpu"), Runner()) for m in (model, fast)
    ]
    assert networks[0] is not None
    return Passes(networks[0], networks[1])


def in_order(parts: Iterator[Rows]) -> Rows:
    rows = joined(parts)
    order = rows["place"].argsort()
    assert rows["place"][order].tolist() == list(range(COUNT))
    return {name: values[order] for name, values in rows.items()}


def ignored(rows: Rows) -> None:
    """For what a cascade tells as searches end."""


def stages(threat: Threat | None = None) -> list[Stage]:
    threat = threat or Threat("linf", EPS)
    return [Stage(ApgdCe(threat, 5, 2, STEPS)), Stage(ApgdT(threat, 5, 2, STEPS))]


def results(slots: int, sizes: int, chosen: list[Stage] | None = None) -> Rows:
    model, images = problem()
    with passes_of(model) as passes:
        whole = entering(images)
        parts = [{n: v[at : at + sizes] for n, v in whole.items()} for at in range(0, COUNT, sizes)]
        return in_order(cascade.run(chosen or stages(), iter(parts), passes, slots))


RESULTS = ("fooled", "fooled_by", "passed", "found", "margin", "flat")


def assert_same(found: Rows, expected: Rows) -> None:
    for name in RESULTS:
        assert torch.allclose(found[name].double(), expected[name].double(), atol=1e-12), name


@pytest.fixture(scope="module")
def alone() -> Rows:
    """The results where each image is alone in its batches."""
    found = results(1, 1)
    assert 3 < int(found["fooled"].sum()) < COUNT - 3
    assert set(found["fooled_by"].tolist()) == {-1, 0, 1, 2}
    return found


@pytest.mark.parametrize(("slots", "sizes"), [(3, 5), (8, 1), (COUNT, COUNT), (100, 4)])
def test_an_image_s_result_does_not_depend_on_the_batch(
    alone: Rows, slots: int, sizes: int
) -> None:
    assert_same(results(slots, sizes), alone)


def test_an_image_that_is_wrong_without_an_attack_is_not_attacked(alone: Rows) -> None:
    _, images = problem()
    assert alone["fooled"][3]
    assert alone["fooled_by"][3] == 0
    assert torch.equal(alone["found"][3], images.x[3])
    assert alone["margin"][3] < 0


def test_results_are_points_of_the_ball_that_fool_the_network(alone: Rows) -> None:
    model, images = problem()
    with torch.no_grad():
        logits = model(alone["found"])
    assert torch.equal(logits.argmax(1) != images.y, alone["fooled"])
    assert (alone["found"] - images.x).abs().amax() <= EPS + 1e-12
    assert torch.allclose(lead(logits, images.y), alone["margin"], atol=1e-12)


def test_every_pass_but_the_last_ones_is_of_a_full_batch() -> None:
    model, images = problem()
    with passes_of(model) as passes:
        stage = [Stage(ApgdCe(Threat("linf", EPS), 5, 1, STEPS))]
        whole = entering(images)
        model.sizes.clear()
        parts = ({n: v[at : at + 1] for n, v in whole.items()} for at in range(COUNT))
        found = in_order(cascade.run(stage, parts, passes, 8))
    robust = int((~found["fooled"]).sum())
    assert passes.forwards == sum(model.sizes)
    # Each robust image has the first pass and one for each step; the last may save its gradient.
    assert 0 <= passes.forwards - passes.backwards <= robust
    assert (STEPS + 1) * robust < passes.forwards < (STEPS + 1) * COUNT
    assert model.sizes[0] == 8
    # Images enter when an eighth of the slots is free, and the last batches shrink.
    full = [size for size in model.sizes if size >= 7]
    assert sum(full) > 0.5 * sum(model.sizes)


def test_images_that_a_search_has_passed_enter_the_next_one(alone: Rows) -> None:
    model, images = problem()
    with passes_of(model) as passes:
        rows = entering(images)
        survivors = (alone["fooled_by"] == -1) | (alone["fooled_by"] == 2)
        rows["passed"] = survivors.long()
        found = in_order(cascade.run(stages(), iter([rows]), passes, 4))
    for name in ("fooled", "fooled_by", "passed"):
        assert torch.equal(found[name], alone[name]), name


def test_a_pipeline_waits_for_full_batches_and_gives_the_same(alone: Rows) -> None:
    model, images = problem()
    whole = entering(images)
    with passes_of(model) as passes:
        line = Pipeline(stages(), passes, 8)
        model.sizes.clear()
        got: list[Rows] = []
        for at in range(0, COUNT, 5):
            got += line.feed({name: values[at : at + 5] for name, values in whole.items()})
            # At most the two batches under way are held back, and what waits for them.
            assert at + 5 - sum(map(count, got)) <= 2 * 8
        assert sum(size for size in model.sizes if size >= 7) > 0.9 * sum(model.sizes)
        got += line.finish()
    assert_same(in_order(iter(got)), alone)


@pytest.mark.parametrize("slots", [1, 6, COUNT])
def test_a_batch_of_fixed_size_gives_the_same(alone: Rows, slots: int) -> None:
    model, images = problem()
    with passes_of(model) as passes:
        stream: Iterator[Rows] = iter([entering(images)])
        for number, stage in enumerate(stages(), 1):
            engine = FixedEngine(stage.search, passes, slots)
            stream = cascade._survivors(number, engine, stream, ignored)
        model.sizes.clear()
        found = in_order(stream)
    assert_same(found, alone)
    assert len(set(model.sizes)) <= 2 * 2  # of each search: its slots, and half of them at the end


class Lying(Counted):
    """A network of low precision, so to speak: it takes every other image for another class."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        wrong = (x.flatten(1).sum(1) * 1e6).long() % 2 == 0
        return torch.where(wrong[:, None], logits.flip(1), logits)


@pytest.mark.parametrize("fixed", [False, True])
def test_an_example_counts_only_if_the_network_s_own_precision_confirms_it(fixed: bool) -> None:
    model, images = problem()
    fast = Lying().eval()
    with passes_of(model, fast) as passes:
        search = ApgdCe(Threat("linf", EPS), 5, 1, STEPS)
        engine = FixedEngine(search, passes, 6) if fixed else Engine(search, passes, 6)
        right = entering(images)
        found = in_order(cascade._survivors(1, engine, iter([right]), ignored))
    with torch.no_grad():
        wrong = model(found["found"]).argmax(1) != images.y
    assert torch.equal(wrong & found["fooled"], found["fooled"])
    assert 1 < int(found["fooled"].sum()) < COUNT


class Sudden(Search):
    """Ends at once, with a gradient that is not finite for image 14."""

    name = "sudden"

    def start(self, images: Images, segment: int) -> State:
        return {"point": images.x}

    def objective(self, logits: Tensor, state: State) -> Tensor:
        return torch.where(state["index"] == 14, logits.sum(1) / 0, logits.sum(1))

    def tell(self, state: State, seen: Seen) -> State:
        return {"done": torch.ones_like(seen.wrong)}


@pytest.mark.parametrize("engine", [Engine, FixedEngine])
def test_a_gradient_that_is_not_finite_stops_the_attack(engine: type[Engine]) -> None:
    from fastadv.errors import NotFiniteError

    model, images = problem()
    with passes_of(model) as passes, pytest.raises(NotFiniteError, match="no attack is possible"):
        list(engine(Sudden(Threat("linf", EPS)), passes, 4).run(iter([entering(images)])))


def test_the_checkpoints_of_auto_pgd_are_those_of_its_paper() -> None:
    """Croce & Hein (2020): p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06)."""
    at, period = [0.0, 0.22], 0.22
    while at[-1] < 1:
        period = max(period - 0.03, 0.06)
        at.append(at[-1] + period)
    found = [0, *(step for step, period in enumerate(periods(100)) if period)]
    assert found == [round(100 * share) for share in at if share < 1.0 + 1e-9]


def test_a_buffer_gives_rows_in_their_order() -> None:
    buffer = Buffer()
    for start, n in ((0, 3), (3, 4), (7, 1)):
        buffer.put({"a": torch.arange(start, start + n)})
    got = [buffer.take(most)["a"].tolist() for most in (2, 3, 0 + 2, 9)]
    assert got == [[0, 1], [2, 3, 4], [5, 6], [7]]
    assert buffer.count == 0
    assert buffer.take(3) == {}
