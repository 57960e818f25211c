"""Learning-rate schedules number by number."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import LEARNING, tiny_model

from fastadv.by_epoch import Points
from fastadv.errors import UserError
from fastadv.run.config_file import from_bytes, to_toml
from fastadv.run.origin import Origin
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run, resolve_stored
from fastadv.run.schedules import ENDS, Schedule, factor


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


@pytest.mark.parametrize("peak", [0.3, 0.25, 0.6, 0.99, 0.02])
@pytest.mark.parametrize("epochs", [7, 10, 100])
def test_one_cycle_is_torchs_stepped_once_an_epoch(epochs: int, peak: float) -> None:
    """Its momentum, too: from 0.95 to 0.85 and back with torch's defaults."""
    ours = torch.optim.SGD(tiny_model().parameters(), lr=0.1, momentum=0.95)
    theirs = torch.optim.SGD(tiny_model().parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        theirs, max_lr=0.1, total_steps=epochs, pct_start=peak
    )
    batches = 3
    schedule = Schedule(
        ours, "one-cycle", epochs * batches, cycle_momentum=True, peak=peak, epochs=epochs
    )
    for epoch in range(epochs):
        for batch in range(batches):
            schedule(epoch * batches + batch)
            for name in ("lr", "momentum"):
                expected = theirs.param_groups[0][name]
                found = ours.param_groups[0][name]
                assert found == pytest.approx(expected, rel=1e-12), (epoch, batch, name)
        theirs.step()
        if epoch + 1 < epochs:
            scheduler.step()


def test_one_cycle_with_its_usual_peak_and_one_at_the_first_epoch() -> None:
    usual = [factor("one-cycle", update, 10, epochs=10) for update in range(10)]
    assert usual == [factor("one-cycle", update, 10, peak=0.3, epochs=10) for update in range(10)]
    assert max(usual) == usual[2] == 1.0
    assert factor("one-cycle", 0, 10, peak=0.1, epochs=10) == 1.0  # torch divides by 0 here
    assert factor("one-cycle", 0, 5, epochs=1) == pytest.approx(1 / 25e4)


def test_cosine_once_an_epoch_is_that_of_rst() -> None:
    epochs, batches = 13, 7
    for epoch in range(1, epochs + 1):  # counted from 1 there
        expected = 0.5 * (1 + math.cos((epoch - 1) / epochs * math.pi))
        for batch in range(batches):
            update = (epoch - 1) * batches + batch
            found = factor("cosine-epoch", update, epochs * batches, epochs=epochs)
            assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("peak", [None, 0.4, 0.2, 0.75])
def test_the_triangle_is_an_interpolation(peak: float | None) -> None:
    total = 30 * 13
    at = 0.5 if peak is None else peak
    for update in range(total):
        expected = np.interp(update, [0, at * total, total], [0, 1, 0])
        assert factor("triangular", update, total, peak=peak) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("total", [7, 10, 391 * 15])
def test_the_usual_triangle_is_the_same_to_the_bit_as_its_short_formula(total: int) -> None:
    for update in range(total):
        assert factor("triangular", update, total) == 1 - abs(2 * update / total - 1)


def test_the_momentum_of_a_triangle_is_lowest_at_its_peak() -> None:
    optimizer = torch.optim.SGD(tiny_model().parameters(), **LEARNING)
    schedule = Schedule(optimizer, "triangular", 8, cycle_momentum=True, peak=0.25)
    found = []
    for update in range(8):
        schedule(update)
        found.append(optimizer.param_groups[0]["momentum"])
    assert found == pytest.approx(
        [0.9 - 0.1 * factor("triangular", k, 8, peak=0.25) for k in range(8)]
    )
    assert min(found) == pytest.approx(found[2]) == pytest.approx(0.8)


def test_the_drops_of_gairat() -> None:
    """Its rate is 0.1 before epoch 60 of 120, then a tenth, a hundredth and a two-hundredth."""
    epochs, batches = 120, 4
    drops = (59 / 120, 89 / 120, 109 / 120)
    for epoch in range(epochs):
        t = (epoch + 1) / epochs
        expected = 1.0 if t < 0.5 else 0.1 if t < 0.75 else 0.01 if t < 11 / 12 else 0.005
        for batch in range(batches):
            update = epoch * batches + batch
            found = factor(
                "multistep", update, epochs * batches, drops, drop_factors=(0.1, 0.1, 0.5)
            )
            assert found == pytest.approx(expected, rel=1e-12)


def chosen(**settings: Any) -> Any:
    return resolve_run(RunRequest(method="pgd", data="cifar10", **settings))


def test_the_settings_of_the_schedules() -> None:
    usual = chosen()
    assert (usual.drops, usual.drop_factors, usual.peak) == ((0.5, 0.75), None, None)
    assert chosen(drops=(3, 5), drop_factors=(0.1, 0.5)).drop_factors == (0.1, 0.5)
    for schedule, peak in (("triangular", 0.5), ("one-cycle", 0.3)):
        config = chosen(schedule=schedule)
        assert (config.peak, config.origins["peak"]) == (peak, Origin.DEFAULT)
        assert chosen(schedule=schedule, peak=0.4).peak == 0.4
    for settings, sentence in [
        ({"schedule": "cosine", "drop_factors": (0.1,)}, "--drop-factors is for --schedule"),
        ({"drop_factors": (0.1, 0.1, 0.5)}, "--drop-factors has 3 values for 2 drops"),
        ({"peak": 0.3}, "--peak is for --schedule triangular or one-cycle; omit it with piecewise"),
        ({"schedule": "one-cycle", "momentum": 0.05}, "where a one-cycle schedule lowers it"),
    ]:
        with pytest.raises(UserError, match=sentence):
            chosen(**settings)


@pytest.mark.parametrize(
    ("settings", "lost"),
    [({"schedule": "one-cycle"}, "peak"), ({"drop_factors": (0.1, 0.5)}, None)],
)
def test_a_stored_run_has_its_schedule(
    settings: dict[str, Any], lost: str | None, tmp_path
) -> None:
    config = chosen(**settings)
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config))
    assert resolve_stored(from_bytes(path.read_bytes(), path)) == config
    if lost is not None:
        kept = [x for x in path.read_text().splitlines() if not x.startswith(f"{lost} =")]
        path.write_text("\n".join(kept))
        with pytest.raises(UserError, match=f"lacks {lost}"):
            resolve_stored(from_bytes(path.read_bytes(), path))


# -- warm-up and the schedules that end at a share ------------------------------------------------


def rates(total: int, epochs: int, kind: str, **options: Any) -> list[float]:
    return [factor(kind, update, total, epochs=epochs, **options) for update in range(total)]


@pytest.mark.parametrize("end", [0.0, 0.01, 0.3])
def test_schedules_that_end_at_a_share_are_torchs(end: float) -> None:
    total = 40
    makers: dict[str, Any] = {
        "linear": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, end, total),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, total, eta_min=end),
        "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, end ** (1 / total)),
    }
    for kind, make in makers.items():
        if kind == "exponential" and not end:
            continue
        optimizer = torch.optim.SGD(tiny_model().parameters(), lr=1.0)
        theirs = make(optimizer)
        for update in range(total):
            expected = optimizer.param_groups[0]["lr"]
            assert factor(kind, update, total, end=end) == pytest.approx(expected, rel=1e-9)
            optimizer.step()
            theirs.step()


def test_a_warm_up_is_torchs_linear_one_times_the_schedule() -> None:
    total, epochs, rising = 40, 8, 10  # two epochs
    optimizer = torch.optim.SGD(tiny_model().parameters(), lr=1.0)
    schedulers = torch.optim.lr_scheduler
    theirs = schedulers.ChainedScheduler(
        [
            schedulers.LinearLR(optimizer, 1 / rising, 1.0, rising - 1),
            schedulers.CosineAnnealingLR(optimizer, total),
        ]
    )
    for found in rates(total, epochs, "cosine", warmup=2.0):
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_a_warm_up_of_fractions_of_an_epoch_and_one_over_a_drop() -> None:
    found = rates(40, 8, "constant", warmup=0.5)  # 2.5 updates
    assert found[:4] == pytest.approx([0.4, 0.8, 1.0, 1.0])
    assert rates(40, 8, "constant", warmup=0.1) == [1.0] * 40
    stepped = rates(40, 8, "multistep", warmup=6.0, drops=(0.5,))
    assert stepped[19:21] == pytest.approx([20 / 30, 0.1 * 21 / 30])


def test_points_are_an_interpolation_and_stay_after_the_last() -> None:
    points = Points({0: 0.02, 1.5: 0.4, 6: 0.1})
    for update, found in enumerate(rates(80, 8, "points", points=points)):
        expected = np.interp(update / 10, [0, 1.5, 6], [0.02, 0.4, 0.1]) / 0.4
        assert found == pytest.approx(expected, rel=1e-12)


def test_the_rates_of_points_are_those_of_the_optimizer() -> None:
    request: dict[str, Any] = {"points": "0@0,0.1@5,1/10@20,0@30", "optimizer": "adam"}
    chosen = resolve_run(RunRequest(**request))
    assert (chosen.schedule, chosen.lr, chosen.origins["lr"]) == ("points", 0.1, Origin.USER)
    optimizer = torch.optim.Adam(tiny_model().parameters(), lr=chosen.lr)
    schedule = Schedule(
        optimizer, "points", 300, cycle_momentum=False, epochs=30, points=chosen.points
    )
    for update, rate in ((0, 0.0), (25, 0.05), (50, 0.1), (150, 0.1), (250, 0.05)):
        schedule(update)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)
    stored = resolve_stored(from_bytes(to_toml(chosen).encode(), Path("config.toml")))
    assert to_toml(stored) == to_toml(chosen)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"warmup": 2.0, "schedule": "triangular"}, "rises by itself"),
        ({"warmup": 2.0, "schedule": "one-cycle"}, "rises by itself"),
        ({"warmup": 31.0, "schedule": "cosine"}, "takes 31 epochs, and the run has 30"),
        ({"schedule": "points"}, "--points 0@0,0.1@5,0@30"),
        ({"schedule": "cosine", "points": "0@0"}, "omit it with cosine"),
        ({"points": "0@0,0.1@5", "lr": 0.1}, "omit --lr"),
        ({"points": "0@0,0@5"}, "one of them is above 0"),
        ({"points": "0.1@1"}, "must begin with epoch 0"),
        ({"points": "0.1@0,0.2@5,0.1@5"}, "later than the one before"),
        ({"points": "0..1@5"}, "takes value@epoch"),
        ({"points": "0.1"}, "takes value@epoch"),
        ({"end_factor": 0.1, "schedule": "constant"}, "cosine, linear or exponential"),
        ({"end_factor": 0.0, "schedule": "exponential"}, "above 0"),
    ],
)
def test_schedules_that_cannot_be_followed(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve_run(RunRequest(**settings))


def test_the_usual_ends_are_stored() -> None:
    ends = {kind: resolve_run(RunRequest(schedule=kind)).end_factor for kind in ENDS}
    assert ends == {"cosine": 0.0, "linear": 0.0, "exponential": 0.01}
    assert resolve_run(RunRequest(schedule="constant")).end_factor is None
