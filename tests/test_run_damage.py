"""Files of a run that are cut short, have a flipped bit or are gone: noticed, and made good."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
from kept_runs import SETTINGS, begun, best_is
from run_damage import WAYS, Harness

from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.train import train

SMALL = SETTINGS | {"epochs": 3, "limit": 48, "test_limit": 8, "keep": "best,last,previous,every-2"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        best_is(1, patch)
        train(RunRequest(**SMALL, out=str(out)), Console())
    return out


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        best_is(1, patch)
        return begun(tmp_path_factory.mktemp("runs") / "run", patch, 2, **SMALL)


@pytest.fixture
def harnesses(
    whole: Path, interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[Harness]:
    best_is(1, monkeypatch)
    return [Harness(run, whole, tmp_path) for run in (interrupted, whole)]


def test_damage_is_noticed(harnesses: list[Harness]) -> None:
    for harness in harnesses:
        harness.finishes = False
        for number, (name, way) in enumerate(itertools.product(harness.names, WAYS), 1):
            harness.trial(name, way, number)


@pytest.mark.slow
def test_damage_is_made_good(harnesses: list[Harness]) -> None:
    for harness in harnesses:
        for number, (name, way) in enumerate(itertools.product(harness.names, WAYS), 1):
            harness.trial(name, way, number)


@pytest.mark.long
def test_a_thousand_cuts_and_a_thousand_flipped_bits(
    harnesses: list[Harness], record_property: Callable[[str, object], None]
) -> None:
    number = 0
    for harness in harnesses:
        for way, count in (("cut", 500), ("flip", 500), ("gone", len(harness.names))):
            for name in itertools.islice(itertools.cycle(harness.names), count):
                number += 1
                harness.trial(name, way, number)
    counts = harnesses[0].counts + harnesses[1].counts
    for what, count in sorted(counts.items()):
        record_property(what, count)
