"""``--keep`` and ``--save-every``: the checkpoint before last.pt, and what a run does with it."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edited import edit

from fastadv.errors import UserError
from fastadv.run import epoch_loop, own_scores
from fastadv.run.console import Console
from fastadv.run.finished import evaluate_run
from fastadv.run.keeping import Kept, kept
from fastadv.run.onward import train_or_resume
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint, files

SETTINGS: dict[str, Any] = {
    "method": "fast", "width": 2, "epochs": 4, "limit": 96, "batch_size": 32, "mode": "eager",
    "select_attack": "fgsm", "test_attacks": "clean,fgsm", "test_limit": 40, "lr": 0.5,
    "options": {"averaging": "ema"},
}  # fmt: skip


class PowerCut(Exception):
    """Ends a run at once, as SIGKILL does."""


def cut_after(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends when the checkpoint after ``epoch`` has been written."""
    save = RunFolder.save_last

    def save_then_end(self: RunFolder, payload: dict[str, Any], **options: Any) -> None:
        save(self, payload, **options)
        if payload["progress"]["epoch"] == epoch and not payload["progress"]["batch"]:
            raise PowerCut

    monkeypatch.setattr(RunFolder, "save_last", save_then_end)


def begun(out: Path, monkeypatch: pytest.MonkeyPatch, epoch: int = 3, **settings: Any) -> Path:
    """A run of ``SETTINGS`` that ended after ``epoch``."""
    with monkeypatch.context() as patch:
        cut_after(epoch, patch)
        with pytest.raises(PowerCut):
            train(RunRequest(**SETTINGS | settings, out=str(out)), Console())
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(RunRequest(**SETTINGS, out=str(out)), Console())
    return out


@pytest.fixture(scope="module")
def _interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return begun(tmp_path_factory.mktemp("runs") / "run", patch)


@pytest.fixture
def interrupted(_interrupted: Path, tmp_path: Path) -> Path:
    """A run that ended after three of four epochs."""
    return Path(shutil.copytree(_interrupted, tmp_path / "run"))


def require_same(out: Path, whole: Path) -> None:
    """All weights, states and numbers of two runs but the times are equal."""

    def compare(name: str, one: Any, two: Any) -> None:
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two), name
        elif isinstance(one, dict):
            assert one.keys() == two.keys(), name
            for key in one:
                compare(f"{name} {key}", one[key], two[key])
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(two), name
            for place, pair in enumerate(zip(one, two, strict=True)):
                compare(f"{name} {place}", *pair)
        elif not name.endswith(("second", "seconds", "memory_mb", "checksum", "configuration")):
            assert one == two, name

    for file in ("last.pt", "best.pt", "averaged.pt"):
        compare(file, checkpoint.load(out / file), checkpoint.load(whole / file))
    for file in ("summary.json", "metrics.jsonl"):
        found, expected = (
            [json.loads(line) for line in text.splitlines()]
            if file.endswith("jsonl")
            else json.loads(text)
            for text in ((out / file).read_text(), (whole / file).read_text())
        )
        compare(file, found, expected)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, without the ends of its lines."""
    return " ".join(capsys.readouterr().out.split())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()  # previous.pt may be another name of it
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {"cut": truncate, "flip": flip, "gone": Path.unlink}
WAYS = ["cut", *(pytest.param(way, marks=pytest.mark.slow) for way in ("flip", "gone"))]


def progress(path: Path) -> dict[str, Any]:
    return dict(checkpoint.load(path)["progress"])


# -- the checkpoint before ------------------------------------------------------------------------


def test_the_checkpoint_before_is_kept(interrupted: Path) -> None:
    assert progress(interrupted / "last.pt")["epoch"] == 3
    assert progress(interrupted / "previous.pt")["epoch"] == 2


@pytest.mark.parametrize("damage", WAYS)
def test_a_damaged_checkpoint_is_told_and_the_one_before_used(
    interrupted: Path, whole: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    DAMAGE[damage](interrupted / "last.pt")
    resume(str(interrupted), Console())
    said = shown(capsys)
    assert (
        "last.pt" in said.partition("The run continues from the checkpoint before, of epoch 2.")[0]
    )
    assert "continuing in epoch 3" in said
    require_same(interrupted, whole)


def test_both_damaged(interrupted: Path) -> None:
    before = (interrupted / "best.pt").read_bytes()
    for name in ("last.pt", "previous.pt"):
        truncate(interrupted / name)
    with pytest.raises(UserError, match=r"last\.pt cannot be read.*previous\.pt cannot be read"):
        resume(str(interrupted), Console())
    (interrupted / "previous.pt").unlink()
    with pytest.raises(UserError, match=r"There is no checkpoint before it\. Train into another"):
        resume(str(interrupted), Console())
    assert (interrupted / "best.pt").read_bytes() == before


def test_a_checkpoint_that_may_not_be_read_is_not_damaged(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not replaced by the one before."""
    open_file = os.open

    def refused(path: Any, *how: Any, **options: Any) -> int:
        if os.fspath(path).endswith("last.pt"):
            raise PermissionError(13, "Permission denied")
        return open_file(path, *how, **options)

    before = (interrupted / "last.pt").read_bytes()
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(UserError, match=r"Cannot read .*last\.pt: Permission denied"):
        resume(str(interrupted), Console())
    monkeypatch.undo()
    assert (interrupted / "last.pt").read_bytes() == before


def test_there_is_always_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every call of the system between two checkpoints; with hard links and without."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"

    def look() -> set[int]:
        held = set()
        for path in (last, previous):
            if path.exists():
                held.add(checkpoint.load(path)["number"])
        return held

    calls = {name: getattr(os, name) for name in ("replace", "link", "unlink", "fsync")}
    seen: list[set[int]] = []

    def watched(name: str) -> Callable[..., Any]:
        def call(*words: Any, **options: Any) -> Any:
            seen.append(look())
            found = calls[name](*words, **options)
            seen.append(look())
            return found

        return call

    def no_links(*_: Any, **__: Any) -> None:
        raise OSError(95, "Operation not supported")

    for linked in (True, False):
        checkpoint.save(last, {"number": 0}, previous)
        for name in calls:
            monkeypatch.setattr(os, name, watched(name))
        if not linked:
            monkeypatch.setattr(os, "link", no_links)
        for number in (1, 2, 3):
            seen.clear()
            checkpoint.save(last, {"number": number}, previous)
            assert seen
            assert all(number - 1 in held or number in held for held in seen)
            assert look() == {number - 1, number}
        monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "previous.pt"]


def test_the_checkpoint_before_is_not_written_twice(tmp_path: Path) -> None:
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    checkpoint.save(last, {"number": 1}, previous)
    place = last.stat().st_ino
    checkpoint.save(last, {"number": 2}, previous)
    assert previous.stat().st_ino == place


def test_one_file_may_have_both_names(tmp_path: Path) -> None:
    """As after a return to the checkpoint before."""
    last, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    checkpoint.save(previous, {"number": 1})
    for _ in range(2):
        files.keep(previous, last)
    assert checkpoint.load(last) == checkpoint.load(previous) == {"number": 1}
    checkpoint.save(last, {"number": 2}, previous)
    assert (checkpoint.load(last), checkpoint.load(previous)) == ({"number": 2}, {"number": 1})
    assert len(list(tmp_path.iterdir())) == 2


# -- the best weights -----------------------------------------------------------------------------


def best_is(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of ``epoch`` (from 1) are the best."""
    keep = own_scores.OwnScores._keep_best

    def scored(self: Any, scores: dict[str, float]) -> None:
        found = dict(scores) | {"fgsm": float(self.progress.epoch + 1 == epoch)}
        keep(self, found)

    monkeypatch.setattr(own_scores.OwnScores, "_keep_best", scored)


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


@pytest.mark.parametrize("scores", [(0.1, 0.2, 0.3, 0.4), (0.2, 0.1, 0.4, 0.3)])
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


def test_damaged_best_weights_lead_to_the_last(interrupted: Path) -> None:
    truncate(interrupted / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt .* Its last weights may be whole: --which last"):
        evaluate_run(str(interrupted), "clean")
    assert evaluate_run(str(interrupted), "clean", which="last").n == 360


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


# -- what is kept ---------------------------------------------------------------------------------


def test_words() -> None:
    assert kept(("best", "last", "previous")) == Kept(True, True, True, None)
    assert kept(("every-10",)) == Kept(False, False, False, 10)
    assert [epoch for epoch in range(1, 8) if kept(["every-3"]).keeps(epoch)] == [3, 6]
    for words, sentence in (
        (["bets"], "did you mean 'best'"),
        (["every-0"], "every-N takes a whole number of epochs such as every-10, not 'every-0'"),
        (["every-2", "every-3"], "takes one every-N"),
        ([], "must keep something"),
    ):
        with pytest.raises(UserError, match=sentence):
            kept(words)


def test_without_last_the_checkpoints_are_there_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    out = begun(tmp_path / "run", monkeypatch, keep="best,previous")
    assert {"last.pt", "previous.pt"} <= {path.name for path in out.iterdir()}
    summary = resume(str(out), Console())
    assert sorted(path.name for path in out.iterdir() if path.suffix == ".pt") == ["best.pt"]
    assert summary["last"] == json.loads((whole / "summary.json").read_text())["last"]
    assert resume(str(out), Console()) == summary
    assert evaluate_run(str(out), "clean", limit=8).n == 8
    with pytest.raises(UserError, match=r"has no last\.pt.*--keep best,previous"):
        evaluate_run(str(out), "clean", which="last", limit=8)
    edit(out / "config.toml", "epochs = 4", "epochs = 6")
    with pytest.raises(UserError, match=r"kept no last\.pt \(--keep best,previous\)"):
        resume(str(out), Console())


def test_without_best_the_best_weights_are_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    best_is(1, monkeypatch)
    out = tmp_path / "run"
    summary = train(RunRequest(**SETTINGS | {"keep": "last"}, out=str(out)), Console())
    names = sorted(path.name for path in out.iterdir() if path.suffix == ".pt")
    assert names == ["averaged.pt", "last.pt"]
    assert (summary["best"], summary["best_epoch"]) == (None, 1)
    assert "best.pt" not in shown(capsys)
    with pytest.raises(UserError, match=r"has no best\.pt.*--keep last"):
        evaluate_run(str(out), "clean", limit=8)


@pytest.mark.slow
def test_what_is_kept_changes_no_bit(tmp_path: Path, whole: Path) -> None:
    out = tmp_path / "run"
    settings = SETTINGS | {"keep": "best,last,every-2", "save_every": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(RunRequest(**settings, out=str(out)), Console())
    require_same(out, whole)


def test_save_every(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = RunFolder.save_last

    def noted(self: RunFolder, payload: dict[str, Any], **options: Any) -> None:
        saved.append(payload["progress"]["epoch"])
        save(self, payload, **options)

    monkeypatch.setattr(RunFolder, "save_last", noted)
    train(
        RunRequest(**SETTINGS | {"epochs": 5, "save_every": 2}, out=str(tmp_path / "a")), Console()
    )
    assert saved == [2, 4, 5]


@pytest.mark.slow
def test_killed_before_the_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run begins again; nothing was lost that had been saved."""
    evaluate = epoch_loop.EpochLoop._evaluate_epoch

    def cut(self: Any, **options: Any) -> None:
        evaluate(self, **options)
        if self.progress.epoch == 2:
            raise PowerCut

    plain = tmp_path / "plain"
    train(RunRequest(**SETTINGS | {"save_every": 4}, out=str(plain)), Console())
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(epoch_loop.EpochLoop, "_evaluate_epoch", cut)
        with pytest.raises(PowerCut):
            train(RunRequest(**SETTINGS | {"save_every": 4}, out=str(out)), Console())
    assert not (out / "last.pt").exists()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    resume(str(out), Console())
    require_same(out, plain)
