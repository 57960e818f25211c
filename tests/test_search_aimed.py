"""PMA, MALT and quick against loops written by hand from their formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from test_search import (
    COUNT,
    EPS,
    Counted,
    entering,
    ignored,
    in_order,
    passes_of,
    problem,
)
from torch import Tensor

import fastadv
from fastadv.errors import UserError
from fastadv.evaluation.attacks.names import parse_attack
from fastadv.evaluation.search import cascade, quick
from fastadv.evaluation.search.apgd import ApgdT
from fastadv.evaluation.search.cascade import Stage
from fastadv.evaluation.search.engine import Engine
from fastadv.evaluation.search.fixed import FixedEngine
from fastadv.evaluation.search.malt import Malt
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.pma import START, Pma
from fastadv.evaluation.search.quick import CE, MARGIN, Quick, Run
from fastadv.evaluation.search.rows import Rows
from fastadv.evaluation.search.search import Images, Search, Seen, State
from fastadv.threat import Threat

SEED = 5
RADII = {"linf": EPS, "l2": 0.3}


def softmax_margin(model: Counted, x: Tensor, y: int) -> tuple[Tensor, Tensor, Tensor]:
    """p_y and max_{j != y} p_j of one image (1,C,H,W), and its logits."""
    logits = model(x)[0]
    p = logits.exp() / logits.exp().sum()
    others = torch.cat([p[:y], p[y + 1 :]])
    return p[y], others.max(), logits


def pma_by_hand(
    model: Counted, x: Tensor, y: int, threat: Threat, start: Tensor, raises_other: bool, steps: int
) -> list[Tensor]:
    """The points of one run on one image (1,C,H,W), the start among them, until one fools."""
    eps, half, points = float(threat.eps), steps // 2, [start]
    for number in range(steps):
        point = points[-1].clone().requires_grad_()
        own, other, logits = softmax_margin(model, point, y)
        if logits.argmax() != y:
            return points
        loss = other - own if number >= half else other if raises_other else -own
        (gradient,) = torch.autograd.grad(loss, point)
        k, length = (number, half) if number < half else (number - half, steps - half)
        size = eps * (1 + math.cos(math.pi * k / length))
        if threat.norm == "linf":
            moved = points[-1] + size * gradient.sign()
            moved = x + (moved - x).clamp(-eps, eps)
        else:
            moved = points[-1] + size * gradient / gradient.norm() - x
            moved = x + moved * min(1.0, eps / float(moved.norm()))
        points.append(moved.clamp(0, 1))
    return points


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("segment", [0, 1])
def test_pma_moves_along_its_two_objectives(norm: str, segment: int) -> None:
    model, images = problem()
    threat, steps = Threat(norm, RADII[norm]), 7
    search = Pma(threat, SEED, 2, steps)
    state = {**images._asdict(), **search.start(images, segment)}
    shift = START.shift + segment * (1 << 32)
    starts = threat.start(images.x, images.index, SEED, shift, START.number)
    paths = [
        pma_by_hand(model, images.x[i, None], int(images.y[i]), threat, starts[i, None],
                    segment == 1, steps)
        for i in range(len(images.x))
    ]  # fmt: skip
    assert sum(len(path) == steps + 1 for path in paths) > 5
    with passes_of(model) as passes:
        for number in range(steps + 1):
            for i, path in enumerate(paths):
                if number < len(path):
                    close(state["point"][i], path[number][0])
            assert bool(search.wants_gradient(state).eq(number < steps).all())
            told = search.tell(state, seen_at(passes, search, state))
            assert bool(told["done"].eq(number == steps).all())
            state |= told


def distances_by_hand(model: Counted, x: Tensor, y: int, norm: str) -> list[float]:
    """(z_y - z_j)/|grad (z_y - z_j)|, the dual norm, for each class j of one image (1,C,H,W)."""
    point = x.clone().requires_grad_()
    logits = model(point)[0]
    found = []
    for j in range(len(logits)):
        if j == y:
            found.append(math.inf)
            continue
        ahead = logits[y] - logits[j]
        (gradient,) = torch.autograd.grad(ahead, point, retain_graph=True)
        steepness = gradient.abs().sum() if norm == "linf" else gradient.square().sum().sqrt()
        found.append(float((ahead / steepness).detach()))
    return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_malt_takes_the_nearest_class_of_a_linear_network_first(norm: str) -> None:
    model, images = problem()
    threat, steps = Threat(norm, RADII[norm]), 4
    search = Malt.of(threat, SEED, 5, steps, None)
    assert isinstance(search, Malt)
    assert (search.segments, search.candidates) == (4, 4)
    plain = ApgdT(threat, SEED, 4, steps)
    right = torch.arange(COUNT) != 3
    images = Images(*(values[right] for values in images))
    hand = torch.tensor(
        [distances_by_hand(model, x[None], int(y), norm) for x, y in zip(*images[:2], strict=True)],
        dtype=torch.float64,
    )
    order = hand.argsort(dim=1)
    ranked = images.logits.argsort(dim=1, descending=True)[:, 1:]
    assert not torch.equal(order[:, :4], ranked)
    with passes_of(model) as passes:
        first = torch.zeros(len(images.x), dtype=torch.int64)
        state = {**images._asdict(), "segment": first, **search.start(images, 0)}
        for _ in range(4):
            assert torch.equal(state["point"], images.x)
            state |= search.tell(state, seen_at(passes, search, state))
            assert not state["done"].any()
        close(state["distances"], hand)
        for segment in range(4):
            if segment:
                fresh = search.start(images, segment)
                state |= fresh | {"distances": hand, "segment": first + segment}
            other = {**images._asdict(), **plain.start(images, segment)}
            other["target"] = order[:, segment]
            for number in range(steps + 1):
                close(state["point"], other["point"])
                assert torch.equal(state["done"], torch.full_like(state["done"], False))
                state |= search.tell(state, seen_at(passes, search, state))
                other |= plain.tell(other, seen_at(passes, plain, other))
                assert bool(state["done"].eq(number == steps).all())
                state["done"] = torch.zeros_like(state["done"])


@pytest.mark.parametrize("made", [Pma, Malt])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_results_do_not_depend_on_the_batch(made: type[Search], norm: str) -> None:
    found = [through(made.of(Threat(norm, RADII[norm]), SEED, 5, 6, 2), slots) for slots in (1, 4)]
    for name in ("fooled", "margin", "found"):
        close(found[0][name].double(), found[1][name].double())
    assert 0 < int(found[0]["fooled"].sum()) < COUNT


def test_malt_remembers_the_distances_in_its_further_runs() -> None:
    noted: list[Tensor] = []

    class Noting(Malt):
        def tell(self, state: State, seen: Seen) -> State:
            noted.append(state["distances"][state["segment"] > 0].isfinite().sum(1))
            return super().tell(state, seen)

    through(Noting(Threat("linf", 0.01), SEED, 2, 3, candidates=4), 5)
    assert torch.cat(noted).tolist() == [4] * (COUNT - 1) * 4


def test_malt_measures_the_distances_once() -> None:
    """Four passes at the image, then the runs of those that stay robust."""
    model, images = problem()
    with passes_of(model) as passes:
        search = Malt.of(Threat("linf", 1e-4), SEED, 5, 6, 3)
        stream = cascade.run([Stage(search)], iter([entering(images)]), passes, 9)
        assert int(in_order(stream)["fooled"].sum()) == 1
    robust = COUNT - 1
    assert passes.forwards == robust * (4 + 3 * 7)


def through(search: Search, slots: int) -> Rows:
    model, images = problem()
    with passes_of(model) as passes:
        return in_order(cascade.run([Stage(search)], iter([entering(images)]), passes, slots))


def seen_at(passes: Passes, search: Search, state: State) -> Seen:
    logits, loss, gradient = passes.gradient(search, state)
    return Seen(logits, loss, gradient, logits.argmax(1) != state["y"])


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


SHORT = (
    Run(4, MARGIN, 0.6, reach=2.0),
    Run(3, 0, 0.5),
    Run(5, MARGIN, 0.3),
    Run(3, CE, 0.2),
    Run(3, 1, 0.0),
)


def quick_by_hand(
    model: Counted, x: Tensor, y: int, starts: list[Tensor], threat: Threat
) -> tuple[bool, float, int]:
    """For one image (1,C,H,W): fooled, the smallest margin, and the number of passes."""

    def seen(point: Tensor) -> tuple[Tensor, float]:
        logits = model(point)[0]
        ahead = float((logits[y] - torch.cat([logits[:y], logits[y + 1 :]]).max()).detach())
        return logits, ahead

    eps, passes = float(threat.eps), 0
    ranked, first = seen(x)
    least = first
    if first < 0:
        return True, first, 0
    for number, (run, start) in enumerate(zip(SHORT, starts, strict=True)):
        point = start
        for k in range(run.steps + 1):
            point = point.detach().requires_grad_()
            logits, ahead = seen(point)
            passes += 1
            if ahead < least:
                least = ahead
                ranked = ranked if number else logits
            if ahead < 0:
                return True, least, passes
            others = [j for j in ranked.argsort(descending=True).tolist() if j != y]
            p = logits.softmax(0)
            if run.rank == MARGIN:
                loss = torch.cat([p[:y], p[y + 1 :]]).max() - p[y]
            elif run.rank == CE:
                loss = -p[y].log()
            else:
                loss = logits[others[run.rank]] - logits[y]
            (gradient,) = torch.autograd.grad(loss, point)
            size = eps * run.reach * (1 + math.cos(math.pi * k / run.steps)) / 2
            moved = (point - x + size * gradient.sign()).clamp(-eps, eps)
            point = (x + moved).clamp(0, 1)
        if least >= run.near * first:
            break
    return False, least, passes


@pytest.mark.parametrize("slots", [1, 4])
def test_quick_gives_up_images_that_stay_far_from_the_boundary(slots: int) -> None:
    model, images = problem()
    threat = Threat("linf", 0.08)
    search = Quick(threat, SEED, runs=SHORT)
    number, shift = quick.START
    starts = [
        threat.start(images.x, images.index, SEED, shift + run * (1 << 32), number)
        for run in range(len(SHORT))
    ]
    hand = [
        quick_by_hand(model, images.x[i, None], int(images.y[i]),
                      [start[i, None] for start in starts], threat)
        for i in range(COUNT)
    ]  # fmt: skip
    fooled, least, counts = (list(column) for column in zip(*hand, strict=True))
    # Given up after each of the runs, and fooled in the first and in the last one.
    assert {n for n, gone in zip(counts, fooled, strict=True) if not gone} == {5, 9, 15, 19, 23}
    assert {n for n, gone in zip(counts, fooled, strict=True) if gone} == {0, 2, 22}
    with passes_of(model) as passes:
        found = in_order(cascade.run([Stage(search)], iter([entering(images)]), passes, slots))
    assert found["fooled"].tolist() == fooled
    close(found["margin"], torch.tensor(least, dtype=torch.float64))
    assert passes.forwards == sum(counts)


@pytest.mark.parametrize("made", [Malt, Quick])
def test_what_an_interrupted_search_remembered_is_found_again(made: type[Search]) -> None:
    """A stored image says which run it is in, and not what was learned of it."""
    model, images = problem()
    threat = Threat("linf", 0.05)
    found = []
    for segment in (0, 2):
        search = made.of(threat, SEED, 5, None if made is Quick else 6, None)
        rows = entering(images)
        rows["segment"] = torch.full_like(rows["segment"], segment)
        with passes_of(model) as passes:
            found.append(in_order(cascade.run([Stage(search)], iter([rows]), passes, 5)))
    for name in ("fooled", "margin"):
        close(found[0][name].double(), found[1][name].double())
    assert 0 < int(found[0]["fooled"].sum()) < COUNT


@pytest.mark.parametrize("made", [Pma, Malt, Quick])
def test_a_batch_of_fixed_size_gives_the_same(made: type[Search]) -> None:
    model, images = problem()
    found = []
    for kind in (Engine, FixedEngine):
        search = made.of(Threat("linf", 0.05), SEED, 5, None if made is Quick else 6, None)
        with passes_of(model) as passes:
            engine = kind(search, passes, 6)
            found.append(in_order(cascade._survivors(1, engine, iter([entering(images)]), ignored)))
    for name in ("fooled", "margin", "found"):
        close(found[0][name].double(), found[1][name].double())


def test_quick_has_no_numbers_and_no_targets_of_yours() -> None:
    with pytest.raises(UserError, match="takes no number"):
        parse_attack("quick-20")
    with pytest.raises(UserError, match="takes no steps"):
        parse_attack("quick").with_options(steps=20)
    with pytest.raises(UserError, match="no targets of yours"):
        Quick.check(Threat("linf", 0.1, targeted=True), "quick")


@pytest.mark.parametrize("classes", [2, 3])
def test_quick_works_with_few_classes(classes: int) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(50, classes)).double()
    x = torch.rand(9, 2, 5, 5, dtype=torch.float64)
    y = model(x).argmax(1)
    x_adv = fastadv.attack(model, x, y, "quick", eps=0.2)
    assert (x_adv - x).abs().amax() <= 0.2 + 1e-9
    # A linear network is fooled if and only if one of its margins is shorter than eps.
    weight, logits = model[1].weight, model(x)
    reach = torch.stack(
        [
            torch.stack([(logits[i, y[i]] - logits[i, j]) / (weight[y[i]] - weight[j]).abs().sum()
                         if j != y[i] else logits.new_tensor(9.0) for j in range(classes)]).min()
            for i in range(9)
        ]
    )  # fmt: skip
    inside = ((x > 0.2) & (x < 0.8)).flatten(1).all(1)
    fooled = model(x_adv).argmax(1) != y
    assert bool((fooled == (reach < 0.2))[inside | (reach > 0.2)].all())
    assert bool(fooled.any())
