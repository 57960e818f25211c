"""A run that was killed at any moment ends as one that was not: every bit of last.pt and every
number of metrics.jsonl but the times."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from killed_runs import PLACES, Kill, killed_and_finished, trained
from PIL import Image
from test_resume import same

SMALL: dict[str, Any] = {
    "epochs": 3,
    "limit": 128,
    "batch_size": 32,
    "width": 2,
    "test_limit": 20,
    "mode": "eager",
    "test_attacks": "clean,fgsm,pgd-3",
    "select_attack": "pgd-3",
    "checkpoint_minutes": 0.001,
}
STATEFUL = [
    *("swa", "free", "atta-1", "atta-3", "atta-10", "atta-10-cyclic", "fgsm-plus", "apart"),
    *("apart-no-layers", "apart-no-start", "liet", "ikl", "acat", "te", "trades-te", "sat"),
    *("trades-sat", "fgsm-n-advlc-swa", "advlc-swa", "fgsm-mep", "fgsm-ep", "fgsm-bp", "elle-a"),
    *("pgd-ema", "zero-grad", "ssat", "rs-aaer", "n-aaer", "fgsm-uap", "fgsm-cuap", "fgsm-fuap"),
    *("fgsm-rs-cs", "fgsm-mep-cs", "fgsm-pco"),
]
"""The recipes whose parts keep something from one update to the next; the others of this kind are
the same parts with the settings of ImageNet, or need networks of other runs."""
KILLS = 200


def settings_of(method: str, **more: Any) -> dict[str, Any]:
    return SMALL | {"method": method} | more


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 training and 12 test JPEGs, in two classes."""
    folder = tmp_path_factory.mktemp("tree")
    rng = np.random.default_rng(0)
    for part, count in (("train", 80), ("test", 12)):
        for n in range(count):
            place = folder / part / "ab"[n % 2]
            place.mkdir(parents=True, exist_ok=True)
            coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((16, 16)).save(place / f"{n:02}.jpg")
    return folder


def streamed(tree: Path, method: str) -> dict[str, Any]:
    return settings_of(
        method, data=f"folder:{tree}", loader="dali", limit=None, eps="8/255", epochs=2
    )


def require_all_places(settings: dict[str, Any], place: Path, kills: list[Kill], world: int) -> int:
    """Finish one run whole, and one for each of ``kills``; the number of kills that hit."""
    assert trained(settings, place / "whole", world) == [0] * world
    hit = 0
    for number, kill in enumerate(kills):
        out = place / f"killed-{number}"
        hit += killed_and_finished(settings, out, [kill], world)
        same(out, place / "whole")
    return hit


@pytest.mark.slow
@pytest.mark.parametrize("method", ["apart", "atta-1"])
def test_killed_at_every_kind_of_place(method: str, tmp_path: Path) -> None:
    """Of one process, at places that a time would seldom hit."""
    kills = [Kill(5, place) for place in PLACES] + [Kill(2, "within the final test")]
    settings = settings_of(method, options={"averaging": "ema"}, keep="best,last,previous,every-2")
    assert require_all_places(settings, tmp_path, kills, 1) == len(kills)


@pytest.mark.slow
def test_one_of_two_processes_killed(tmp_path: Path) -> None:
    kills = [
        Kill(6, "within an update", rank=1),
        Kill(4, "within a file", rank=0),
        Kill(3, "within an evaluation", rank=1),
    ]
    assert require_all_places(settings_of("fgsm-mep"), tmp_path, kills, 2) == len(kills)


@pytest.mark.slow
def test_killed_while_dali_streams(tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    # The first file is the note that this user began the run, the second config.toml.
    kills = [Kill(4, "within an update"), *(Kill(n, "between files") for n in (1, 2, 3))]
    assert require_all_places(streamed(tree, "apart"), tmp_path, kills, 1) == len(kills)


@pytest.mark.long
def test_200_kills_of_all_recipes_with_state(tree: Path, tmp_path: Path) -> None:
    """At random moments and places, by both loaders, in one process and in two."""
    pytest.importorskip("nvidia.dali")
    draw = random.Random(0)
    cases = [(settings_of(method), 1) for method in STATEFUL]
    cases += [(settings_of(method), 2) for method in ("apart", "free", "fgsm-mep", "te", "swa")]
    cases += [(streamed(tree, method), 1) for method in ("apart", "atta-1", "sat")]
    cases += [(streamed(tree, "apart"), 2)]
    hit = number = 0
    wholes: dict[int, float] = {}
    while hit < KILLS:
        case = number % len(cases)
        settings, world = cases[case]
        if case not in wholes:
            began = time.monotonic()
            assert trained(settings, tmp_path / f"whole-{case}", world) == [0] * world
            wholes[case] = time.monotonic() - began
        rank = None if world == 1 else draw.choice([0, 1, None])
        kills = [Kill(draw.uniform(0, wholes[case]), None, rank)]
        if number % 2:
            kills = [Kill(draw.randint(1, 8), draw.choice(sorted(PLACES)), rank)]
        out = tmp_path / f"killed-{number}"
        found = killed_and_finished(settings, out, kills, world)
        same(out, tmp_path / f"whole-{case}")
        hit, number = hit + found, number + 1
        assert number < 4 * KILLS
