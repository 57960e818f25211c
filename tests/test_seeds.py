"""``--seed 0,1,2``: one run each, continued by the same command, and a summary over them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from fastadv.errors import Interrupted, TrainingError, UserError
from fastadv.evaluation.over_seeds import interval_of_mean
from fastadv.run import onward
from fastadv.run.console import Console
from fastadv.run.loaded import load_run
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.seeds import seeds_in, train_seeds
from fastadv.run.train import train
from fastadv.storage import sealed

SMALL: dict[str, Any] = {
    "method": "fast", "width": 2, "epochs": 1, "limit": 96, "batch_size": 32, "mode": "eager",
    "select_attack": "fgsm", "test_attacks": "clean,fgsm", "test_limit": 40,
}  # fmt: skip


@pytest.mark.slow
def test_several_seeds(tmp_path: Path) -> None:
    request = RunRequest(**SMALL, out=str(tmp_path / "runs"))
    found = train_seeds(request, [0, 1], Console())
    text = (tmp_path / "runs" / "summary.json").read_text()
    assert sealed.open_value(text) == json.loads(json.dumps(found))
    assert found["seeds"] == [0, 1]
    assert found["n"] == 40
    runs = [load_run(str(tmp_path / "runs" / f"seed{seed}")) for seed in range(2)]
    for which in ("best", "last"):
        values = [run.summary[which]["fgsm"] for run in runs if run.summary is not None]
        assert found[which]["fgsm"]["values"] == values
    train(RunRequest(**SMALL, seed=1, out=str(tmp_path / "alone")), Console())
    own, other = load_run(str(tmp_path / "alone")).model.state_dict(), runs[1].model.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)


class Trainings:
    """In place of training: the accuracy of a seed is a tenth of it. ``ends`` holds what happens
    to a seed the first time instead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, ends: dict[int, Exception]) -> None:
        self.begun: list[int] = []
        self.continued: list[str] = []
        self._ends = ends
        monkeypatch.setattr(onward, "train", self._train)
        monkeypatch.setattr(onward, "resume", self._resume)

    def _train(self, asked: RunRequest, console: Console) -> dict[str, Any]:
        assert asked.seed is not None
        self.begun.append(asked.seed)
        config = resolve_run(asked)
        RunFolder.create(config.out, config)
        return self._end(asked.seed)

    def _resume(self, path: str, *_: Any, **__: Any) -> dict[str, Any]:
        self.continued.append(Path(path).name)
        return self._end(RunFolder.open(path).read_config().seed)

    def _end(self, seed: int) -> dict[str, Any]:
        if seed in self._ends:
            raise self._ends.pop(seed)
        return {"n": 40, "best": {"fgsm": seed / 10}, "last": {"fgsm": seed / 10}}


def test_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence = "Stopped by SIGTERM; continue with: fastadv train --resume x"
    stop = Interrupted(sentence, "SIGTERM")
    trainings = Trainings(monkeypatch, {1: stop})
    request = RunRequest(**SMALL, out=str(tmp_path))
    with pytest.raises(Interrupted, match=r"SIGTERM in seed 1; the same command continues"):
        train_seeds(request, [0, 1, 2], Console())
    assert trainings.begun == [0, 1]
    found = train_seeds(request, [0, 1, 2], Console())
    assert trainings.begun == [0, 1, 2]
    assert trainings.continued == ["seed0", "seed1"]
    values = [0, 0.1, 0.2]
    assert found["best"]["fgsm"] == {
        "mean": pytest.approx(0.1),
        "deviation": pytest.approx(0.1),
        "interval": pytest.approx((-0.148414, 0.348414), rel=1e-4),
        "values": values,
    }
    with pytest.raises(UserError, match=r"--epochs 2 \(there: 1\)"):
        train_seeds(RunRequest(**SMALL | {"epochs": 2}, out=str(tmp_path)), [0, 1], Console())


def test_all_seeds_take_the_batch_that_the_first_one_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_for: list[Any] = []

    def begin(asked: RunRequest, console: Console) -> dict[str, Any]:
        asked_for.append(asked.batch_size)
        measured = 48 if asked.batch_size == "auto" else asked.batch_size
        RunFolder.create(asked.out, resolve_run(replace(asked, batch_size=measured)))
        return {"n": 40, "best": {"fgsm": 0.5}, "last": {"fgsm": 0.5}}

    monkeypatch.setattr(onward, "train", begin)
    request = RunRequest(**SMALL | {"batch_size": "auto"}, out=str(tmp_path))
    train_seeds(request, [2, 0, 1], Console())
    assert asked_for == ["auto", 48, 48]


def test_one_that_diverges_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Trainings(monkeypatch, {5: TrainingError("The loss was not finite at step 3.")})
    with pytest.raises(TrainingError, match=r"1 of 3 seeds did not finish, 5: The loss was not"):
        train_seeds(RunRequest(**SMALL, out=str(tmp_path)), [4, 5, 6], Console())
    found = sealed.open_value((tmp_path / "summary.json").read_text())
    assert found["seeds"] == [4, 6]
    assert found["not_finished"] == {"5": "The loss was not finite at step 3."}


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastadv_command: Callable[..., Any]
) -> None:
    Trainings(monkeypatch, {7: TrainingError("The loss was not finite at step 3.")})
    monkeypatch.chdir(tmp_path)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = fastadv_command("train", *words, "--seed", "3,4")
    assert done.code == 0, done.err
    assert sorted(path.name for path in Path("runs").iterdir()) == [
        "fast-digits-seed3", "fast-digits-seed4", "fast-digits-seeds.json",
    ]  # fmt: skip
    assert "over 2 seeds" in done.out
    failed = fastadv_command("train", *words, "--seed", "6,7")
    assert failed.code == 2
    assert "1 of 2 seeds did not finish, 7" in failed.err
    assert "names 3 twice" in fastadv_command("train", "--seed", "3,3").err
    assert "--seed must be" in fastadv_command("train", "--seed", "3,x").err


def test_the_summary_of_several_seeds_and_of_a_run_have_their_own_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, seeds = tmp_path / "run", tmp_path / "seeds"
    train(RunRequest(**SMALL, out=str(run)), Console())
    before = (run / "summary.json").read_bytes()
    with pytest.raises(UserError, match="run holds a run, and several seeds"):
        train_seeds(RunRequest(**SMALL, out=str(run)), [0, 1], Console())
    assert (run / "summary.json").read_bytes() == before
    Trainings(monkeypatch, {})
    train_seeds(RunRequest(**SMALL, out=str(seeds)), [0, 1], Console())
    before = (seeds / "summary.json").read_bytes()
    with pytest.raises(UserError, match="as where several seeds were trained: choose another"):
        train(RunRequest(**SMALL, out=str(seeds)), Console())
    assert (seeds / "summary.json").read_bytes() == before


def test_one_process_speaks_also_before_they_have_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, quiet in (("0", False), ("1", True)):
        monkeypatch.setenv("RANK", rank)
        assert Console().out.quiet is quiet


def test_seeds_in_words() -> None:
    assert seeds_in(None) == [None]
    assert seeds_in("7") == [7]
    assert seeds_in("2, 0") == [2, 0]


@pytest.mark.parametrize(
    ("many", "quantile"), [(2, 12.7062), (6, 2.5706), (15, 2.1448), (40, 2.0227)]
)
def test_interval_of_the_mean(many: int, quantile: float) -> None:
    """Student's t at 97.5 %, from a table."""
    values = [float(place % 3) for place in range(many)]
    half = quantile * stdev(values) / many**0.5
    ends = (mean(values) - half, mean(values) + half)
    assert interval_of_mean(values) == pytest.approx(ends, rel=1e-4)
    assert interval_of_mean([0.5]) is None
