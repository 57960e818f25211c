"""Learning-rate schedules number by number."""

from __future__ import annotations

import pytest
import torch
from tiny import LEARNING, tiny_model

from fastadv.run.schedules import Schedule, factor


@pytest.mark.parametrize(
    ("kind", "factors"),
    [
        ("cosine", [1.0, 0.8535533905932737, 0.5, 0.14644660940672627]),
        ("triangular", [0.0, 0.5, 1.0, 0.5]),
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("piecewise", [1.0, 0.1, 0.01, 0.01]),
    ],
)
def test_the_quarters_of_a_run(kind: str, factors: list[float]) -> None:
    """Update k of 4; a drop comes with the update that completes its share."""
    found = [factor(kind, update, 4) for update in range(4)]
    assert found == pytest.approx(factors, abs=1e-12)


def test_cosine_is_torchs() -> None:
    optimizer = torch.optim.SGD(tiny_model().parameters(), lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for update in range(10):
        assert factor("cosine", update, 10) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("cycled", [False, True])
def test_the_momentum_is_lowest_where_the_rate_is_highest(cycled: bool) -> None:
    optimizer = torch.optim.SGD(tiny_model().parameters(), **LEARNING)
    schedule = Schedule(optimizer, "triangular", 4, cycle_momentum=cycled)
    found = []
    for update in range(4):
        schedule(update)
        found.append(optimizer.param_groups[0]["momentum"])
    assert found == pytest.approx([0.9, 0.85, 0.8, 0.85] if cycled else [0.9] * 4)
