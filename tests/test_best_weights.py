"""best.pt: damaged or lost, it is made again, or the run ends without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_runs import (
    DAMAGE,
    SETTINGS,
    WAYS,
    PowerCut,
    begun,
    best_is,
    cut_after,
    flip,
    progress,
    require_same,
    shown,
    truncate,
)

from fastadv.run import epoch_loop, own_scores
from fastadv.run.console import Console
from fastadv.run.onward import train_or_resume
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint


@pytest.mark.parametrize("damage", WAYS)
def test_lost_best_weights_of_the_epoch_before_are_made_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best_is(3, monkeypatch)
    out = begun(tmp_path / "run", monkeypatch)
    before = checkpoint.load(out / "best.pt")
    DAMAGE[damage](out / "best.pt")
    resume(str(out), Console())
    assert "made again from the checkpoint" in shown(capsys)
    found = checkpoint.load(out / "best.pt")
    assert found.keys() == before.keys()
    assert all(torch.equal(found["model"][name], before["model"][name]) for name in found["model"])
    assert json.loads((out / "summary.json").read_text())["best_epoch"] == 3


@pytest.mark.slow
def test_the_run_goes_back_for_its_best_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the checkpoint before is from before the best epoch."""
    best_is(3, monkeypatch)
    plain = tmp_path / "plain"
    train(RunRequest(**SETTINGS | {"save_every": 2}, out=str(plain)), Console())
    out = begun(tmp_path / "run", monkeypatch, 4, save_every=2)
    assert [progress(out / f"{name}.pt")["epoch"] for name in ("last", "previous")] == [4, 2]
    truncate(out / "best.pt")
    resume(str(out), Console())
    assert "goes back to the checkpoint before, of epoch 2" in shown(capsys)
    require_same(out, plain)


@pytest.mark.slow
def test_best_weights_are_copied_from_those_that_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best_is(1, monkeypatch)
    out = begun(tmp_path / "run", monkeypatch, keep="best,last,every-1")
    before = (out / "best.pt").read_bytes()
    truncate(out / "best.pt")
    with monkeypatch.context() as patch:
        cut_after(4, patch)
        with pytest.raises(PowerCut):
            resume(str(out), Console())
    assert "made again from" in shown(capsys)
    assert checkpoint.load(out / "best.pt")["epoch"] == 1
    (out / "best.pt").write_bytes(before)
    (out / "epochs" / "0001.pt").unlink()
    assert resume(str(out), Console())["best"] is not None


@pytest.mark.parametrize(
    "scores",
    [(0.2, 0.1, 0.4, 0.3), pytest.param((0.1, 0.2, 0.3, 0.4), marks=pytest.mark.slow)],
)
def test_best_weights_of_an_epoch_that_is_trained_again_are_not_lost(
    scores: tuple[float, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The power is cut after best.pt of epoch 3 was written: last.pt is of epoch 2."""
    keep = own_scores.OwnScores._keep_best
    asked = SETTINGS | {"save_every": 2}

    def scored(self: Any, found: dict[str, float], ends_after: int | None = None) -> None:
        epoch = self.progress.epoch + 1
        keep(self, dict(found) | {"fgsm": scores[epoch - 1]})
        if epoch == ends_after:
            raise PowerCut

    monkeypatch.setattr(own_scores.OwnScores, "_keep_best", scored)
    train(RunRequest(**asked, out=str(tmp_path / "plain")), Console())
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(
            own_scores.OwnScores, "_keep_best", lambda self, found: scored(self, found, 3)
        )
        with pytest.raises(PowerCut):
            train(RunRequest(**asked, out=str(out)), Console())
    assert progress(out / "last.pt")["epoch"] == 2
    assert checkpoint.load(out / "best.pt")["epoch"] == 3
    capsys.readouterr()
    resume(str(out), Console())
    said = shown(capsys)
    assert "warning" not in said
    assert "made again" not in said
    require_same(out, tmp_path / "plain")


def test_a_kill_while_checkpoints_are_removed_trains_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = RunRequest(**SETTINGS | {"keep": "best,previous"}, out=str(tmp_path / "run"))
    order: list[str] = []

    def removing(self: RunFolder, *paths: Path) -> None:
        order.extend(path.name for path in paths)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "remove", removing)
        train(asked, Console())
    assert order[-3:] == ["previous.pt", "averaged.pt", "last.pt"]
    (tmp_path / "run" / "previous.pt").unlink()
    summary = (tmp_path / "run" / "summary.json").read_bytes()
    capsys.readouterr()
    again = train_or_resume(asked, Console())
    assert "has finished" in shown(capsys)
    assert again["best"] is not None
    assert not (tmp_path / "run" / "last.pt").exists()
    assert (tmp_path / "run" / "summary.json").read_bytes() == summary


def test_one_of_several_processes_removes_what_a_finished_run_does_not_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have not joined yet: two that take the lock of the folder would refuse each other."""
    asked = RunRequest(**SETTINGS | {"epochs": 1}, out=str(tmp_path / "run"))
    train(asked, Console())
    leftover = tmp_path / "run" / "last_good.pt"
    for rank, stays in (("1", True), ("0", False)):
        leftover.touch()
        monkeypatch.setenv("RANK", rank)
        assert train_or_resume(asked, Console())["best_epoch"] == 1
        assert leftover.exists() == stays


@pytest.mark.parametrize("damage", WAYS)
def test_lost_best_weights_do_not_lose_the_run(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing is left of the best epoch, the run ends with the last weights' results."""
    best_is(1, monkeypatch)
    out = begun(tmp_path / "run", monkeypatch)
    DAMAGE[damage](out / "best.pt")
    summary = resume(str(out), Console())
    said = shown(capsys)
    assert "unless a later epoch is better" in said
    assert "The results are those of the last weights alone" in said
    assert (summary["best"], summary["best_epoch"]) == (None, 1)
    assert summary["last"].keys() == {"clean", "fgsm"}
    assert resume(str(out), Console()) == summary


@pytest.mark.slow
def test_best_weights_damaged_after_the_last_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best_is(1, monkeypatch)
    test = epoch_loop.final_test

    def damaged(self: Any) -> Any:
        flip(self.folder.best)
        return test(self)

    monkeypatch.setattr(epoch_loop, "final_test", damaged)
    out = tmp_path / "run"
    summary = train(RunRequest(**SETTINGS, out=str(out)), Console())
    assert (summary["best"], summary["best_epoch"]) == (None, 1)
    assert "best.pt" in shown(capsys).partition("those of the last weights alone")[0]


def test_weights_of_another_epoch_are_not_the_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """best.pt may be newer than the checkpoint; trained again under other conditions, that epoch
    may be worse."""
    best_is(1, monkeypatch)
    out = begun(tmp_path / "run", monkeypatch)
    saved = checkpoint.load(out / "best.pt")
    checkpoint.save(out / "best.pt", saved | {"epoch": 4})
    assert resume(str(out), Console())["best"] is None
