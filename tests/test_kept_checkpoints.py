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
from edited import edit
from kept_runs import (
    DAMAGE,
    SETTINGS,
    WAYS,
    PowerCut,
    begun,
    best_is,
    progress,
    require_same,
    shown,
    truncate,
)

from fastadv.errors import UserError
from fastadv.run import epoch_loop
from fastadv.run.console import Console
from fastadv.run.finished import evaluate_run
from fastadv.run.keeping import Kept, kept
from fastadv.run.onward import train_or_resume
from fastadv.run.own_scores import OwnScores
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint, files


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


def test_a_run_without_its_settings_is_not_begun_anew(interrupted: Path) -> None:
    (interrupted / "config.toml").unlink()
    before = (interrupted / "last.pt").read_bytes()
    with pytest.raises(UserError, match=r"last\.pt is there without the config\.toml of its run"):
        train_or_resume(RunRequest(**SETTINGS, out=str(interrupted)), Console())
    assert (interrupted / "last.pt").read_bytes() == before


def test_damaged_best_weights_lead_to_the_last(interrupted: Path) -> None:
    truncate(interrupted / "best.pt")
    with pytest.raises(UserError, match=r"best\.pt .* Its last weights may be whole: --which last"):
        evaluate_run(str(interrupted), "clean")
    assert evaluate_run(str(interrupted), "clean", which="last").n == 360


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


def test_what_a_run_that_goes_on_is_to_keep_holds_for_good(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = resume(str(interrupted), Console(), changed={"keep": ("best",)})
    assert sorted(path.name for path in interrupted.glob("*.pt")) == ["best.pt"]
    assert resume(str(interrupted), Console()) == summary  # not "last.pt is missing"
    # The other way round: the same command again removes nothing that it was told to keep.
    out = begun(tmp_path / "other", monkeypatch, keep="best")
    request = RunRequest(**SETTINGS | {"keep": "best,last"}, out=str(out))
    train_or_resume(request, Console())
    train_or_resume(request, Console())
    resume(str(out), Console())
    assert (out / "last.pt").exists()


def test_how_often_a_run_is_saved_may_change_before_its_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(after: int, call: Callable[[], Any]) -> None:
        def cut(loop: Any) -> None:
            if loop.progress.epoch == after:
                raise PowerCut
            real(loop)

        with monkeypatch.context() as patch:
            real = epoch_loop.EpochLoop._train_epoch
            patch.setattr(epoch_loop.EpochLoop, "_train_epoch", cut)
            with pytest.raises(PowerCut):
                call()

    out = tmp_path / "run"
    killed(0, lambda: train(RunRequest(**SETTINGS, out=str(out)), Console()))
    killed(3, lambda: resume(str(out), Console(), changed={"save_every": 4}))
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    killed(0, lambda: resume(str(out), Console()))  # not "last.pt is missing"
    killed(3, lambda: resume(str(out), Console()))
    killed(1, lambda: resume(str(out), Console(), changed={"save_every": 1}))
    assert (out / "last.pt").exists()


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


def test_a_run_that_has_ended_is_not_said_to_have_been_tested_otherwise(
    whole: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "run"))
    text = (out / "config.toml").read_bytes()
    said = r"--test-attacks clean \(there: clean,fgsm\).*fastadv evaluate"
    with pytest.raises(UserError, match=said):
        resume(str(out), Console(), changed={"test_attacks": "clean"})
    assert (out / "config.toml").read_bytes() == text
    same = {"test_attacks": "clean,fgsm", "keep": ("best",)}
    summary = resume(str(out), Console(), changed=same)
    assert list(out.glob("*.pt")) == [out / "best.pt"]
    with pytest.raises(UserError, match=said):
        resume(str(out), Console(), changed={"test_attacks": "clean"})
    assert resume(str(out), Console()) == summary


def test_best_weights_that_are_no_longer_kept_are_not_those_of_an_epoch_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_best = OwnScores._keep_best

    def worth(score: float) -> None:
        def scored(self: Any, scores: dict[str, float]) -> None:
            keep_best(self, dict(scores) | {"fgsm": score})

        monkeypatch.setattr(OwnScores, "_keep_best", scored)

    worth(0.5)
    worse = begun(tmp_path / "worse", monkeypatch, epoch=2)
    better = Path(shutil.copytree(worse, tmp_path / "better"))
    before = (worse / "best.pt").read_bytes()
    for out, score in ((worse, 0.25), (better, 0.75)):
        worth(score)
        resume(str(out), Console(), changed={"keep": ("last",)})
    assert (worse / "best.pt").read_bytes() == before  # still the best
    with pytest.raises(UserError, match=r"has no best\.pt.*--keep last"):
        evaluate_run(str(better), "clean", limit=8)


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
