"""Auto-PGD against the canonical package, from the same start: every point, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_attacks import images, small_net
from torch import Tensor, nn

from fastadv.evaluation.search.apgd import (
    Apgd,
    ApgdCe,
    ApgdDlr,
    ApgdT,
    periods,
    random_surface_point,
)
from fastadv.evaluation.search.search import Images, Seen
from fastadv.threat import Threat

apgd = pytest.importorskip("pyautoattack.autopgd_base")

NORMS = {"linf": "Linf", "l2": "L2"}
EPS = {"linf": 0.06, "l2": 0.5}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """The package's constants have the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def recorded(model: nn.Module, run: Callable[[Callable[[Tensor], Tensor]], Any]) -> list[Tensor]:
    """The points at which ``run`` calls the network."""
    points: list[Tensor] = []

    def seen(x: Tensor) -> Tensor:
        points.append(x.detach().clone())
        logits: Tensor = model(x)
        return logits

    run(seen)
    return points


def ours(
    search: Apgd, model: nn.Module, given: Images, start: Tensor, segment: int
) -> list[Tensor]:
    """The points of one run of ``search`` that begins at ``start``."""
    state = {"x": given.x, "y": given.y, "index": given.index, "logits": given.logits}
    state |= search.start(given, segment)
    state |= {"point": start, "before": start, "best": start}
    points = []
    for step in range(search.steps + 1):
        point = state["point"].clone().requires_grad_()
        points.append(point.detach().clone())
        logits = model(point)
        loss = search.objective(logits, state)
        (gradient,) = torch.autograd.grad(loss.sum(), point)
        seen = Seen(logits.detach(), loss.detach(), gradient, logits.argmax(1) != given.y)
        assert not state.get("done", torch.zeros(1, dtype=torch.bool)).any()
        state |= search.tell(state, seen)
        assert bool(state["done"].all()) == (step == search.steps)
    return points


@pytest.mark.filterwarnings("ignore:there are .* points with zero gradient")
@pytest.mark.parametrize("steps", [1, 7, 30])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("kind", [ApgdCe, ApgdDlr, ApgdT])
def test_every_point_is_the_canonical_one(kind: type[Apgd], norm: str, steps: int) -> None:
    model = small_net()
    x, _ = images(24)
    y = model(x).argmax(1)
    y[::6] = (y[::6] + 1) % 5  # some are wrong before the attack
    threat = Threat(norm, EPS[norm])
    given = Images(x, y, torch.arange(24), model(x).detach())
    search, segment = kind(threat, steps=steps), 2
    start = random_surface_point(threat, given, seed=3, segment=0)
    found = ours(search, model, given, start, segment)

    def canonical(seen: Callable[[Tensor], Tensor]) -> None:
        options = {"n_iter": steps, "norm": NORMS[norm], "eps": EPS[norm], "device": "cpu"}
        if kind is ApgdT:
            attack = apgd.APGDAttack_targeted(seen, **options)
            attack.y_target = given.logits.sort(dim=1)[1][:, -(segment + 2)]
        else:
            attack = apgd.APGDAttack(seen, loss="ce" if kind is ApgdCe else "dlr", **options)
        attack.init_hyperparam(x)
        attack.attack_single_run(x, y, x_init=start)

    expected = recorded(model, canonical)
    assert len(expected) == len(found) == steps + 1
    for step, (own, theirs) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12, msg=f"point {step}")
    if steps > 10:  # steps were halved, at different times
        assert ((found[-1] - found[-2]).flatten(1).abs().amax(1) < EPS[norm] / 2).any()


@pytest.mark.parametrize("steps", [1, 10, 20, 50, 100])
def test_checkpoints_are_the_canonical_ones(steps: int) -> None:
    attack = apgd.APGDAttack(None, n_iter=steps, eps=0.1)
    attack.init_hyperparam(torch.zeros(1, 1))
    checks, period, at = {}, attack.n_iter_2, attack.n_iter_2
    while at <= steps:
        checks[at] = period
        period = max(period - attack.size_decr, attack.n_iter_min)
        at += period
    assert periods(steps) == [checks.get(step, 0) for step in range(steps + 1)]


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_start_is_distributed_as_the_canonical_one(norm: str) -> None:
    """On the surface of the ball: the largest coordinate, or the length, is eps; the others are
    uniform relative to the largest draw, or the direction is that of a Gaussian."""
    x = torch.full((2000, 1, 3, 4), 0.5)
    given = Images(
        x, torch.zeros(2000, dtype=torch.int64), torch.arange(2000), torch.zeros(2000, 2)
    )
    away = (random_surface_point(Threat(norm, 0.1), given, seed=0, segment=0) - x).flatten(1)
    torch.manual_seed(0)
    if norm == "linf":
        torch.testing.assert_close(away.abs().amax(1), torch.full((2000,), 0.1))
        drawn = 2 * torch.rand(2000, 12) - 1
        expected = 0.1 * drawn / drawn.abs().amax(1, keepdim=True)
    else:
        torch.testing.assert_close(away.norm(dim=1), torch.full((2000,), 0.1))
        drawn = torch.randn(2000, 12)
        expected = 0.1 * drawn / drawn.norm(dim=1, keepdim=True)
    levels = torch.linspace(0.02, 0.98, 25)
    own, theirs = away.flatten().quantile(levels), expected.flatten().quantile(levels)
    torch.testing.assert_close(own, theirs, rtol=0, atol=0.004)
    again = random_surface_point(Threat(norm, 0.1), given, seed=0, segment=1)
    assert not torch.equal(again, away.view_as(x) + x)
