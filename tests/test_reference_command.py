"""``fastadv evaluate --reference``: what it prints, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastadv.evaluation.reference import canonical
from fastadv.run.console import Console
from fastadv.run.loaded import load_run
from fastadv.run.request import RunRequest
from fastadv.run.train import train
from fastadv.threat import Threat

pytest.importorskip("pyautoattack")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    settings: dict[str, Any] = {"method": "fast", "width": 2, "epochs": 3, "mode": "eager"}
    train(RunRequest(**settings, out=str(out), eval_every=100), Console())
    return out


def test_our_accuracies_stand_beside_the_packages(
    run: Path, fastadv_command: Callable[..., Any]
) -> None:
    asked = ("--eps", 0.05, "--limit", 30, "--attacks", "clean,apgd-ce", "--reference")
    done = fastadv_command("evaluate", run, *asked)
    assert done.code == 0, done.err
    _, data, model = load_run(str(run), "best").evaluated
    theirs = canonical(model, data.test.limited(30), "apgd-ce", threat=Threat("linf", 0.05))
    rows = re.findall(r"│ (clean|apgd-ce) +│ +([\d.]+) │ +([\d.]+) │ +([+-][\d.]+) │", done.out)
    assert [row[0] for row in rows] == ["clean", "apgd-ce"]
    for (_, ours, other, difference), share in zip(rows, theirs.accuracies.values(), strict=True):
        assert float(other) == pytest.approx(100 * share, abs=0.005)
        assert float(difference) == pytest.approx(float(ours) - float(other), abs=0.011)
    assert f"│ apgd-ce │ {rows[1][1]} │" in done.out  # the usual table
    apart, only_ours, only_theirs = map(
        int, re.findall(r"differ on (\d+) images? \((\d+) right .*?, (\d+) under", done.out)[0]
    )
    assert apart == only_ours + only_theirs
    assert 30 * (float(rows[1][1]) - float(rows[1][2])) / 100 == pytest.approx(
        only_ours - only_theirs, abs=0.01
    )
    assert bool((theirs.fooled_by == 1).any())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--attacks", "clean,pgd-20"), "there is none in 'clean,pgd-20'"),
        (("--attacks", "autoattack", "--which", "both"), "compares one network"),
        (("RUN", "--attacks", "autoattack"), "compares one network"),
    ],
)
def test_refused_before_anything_is_evaluated(
    run: Path, fastadv_command: Callable[..., Any], options: tuple[str, ...], sentence: str
) -> None:
    given = [str(run) if option == "RUN" else option for option in options]
    done = fastadv_command("evaluate", run, *given, "--reference")
    assert done.code == 2
    assert sentence in " ".join(done.err.split())
    assert not done.out
