"""PMA and MALT against loops written by hand from their formulas, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from test_search import COUNT, EPS, Counted, entering, in_order, passes_of, problem
from torch import Tensor

from fastadv.evaluation.search import cascade
from fastadv.evaluation.search.apgd import ApgdT
from fastadv.evaluation.search.cascade import Stage
from fastadv.evaluation.search.malt import Malt
from fastadv.evaluation.search.passes import Passes
from fastadv.evaluation.search.pma import START, Pma
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
