"""``--resume auto``: the same command begins a run, continues it, and shows what it found."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from test_resume import same

from fastadv.errors import Interrupted, UserError
from fastadv.run.epoch_loop import EpochLoop
from fastadv.run.onward import train_or_resume
from fastadv.run.request import RunRequest
from fastadv.run.train import train

SMALL: dict[str, Any] = {
    "method": "fast",
    "epochs": 2,
    "limit": 96,
    "batch_size": 32,
    "width": 2,
    "test_limit": 20,
    "mode": "auto",
    "eps": "0.1",
    "options": {"regularizer": "none"},
}
COMMAND = "train --method fast --epochs 1 --limit 64 --width 2 --test-limit 20 --resume auto"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onward") / "whole"
    train(RunRequest(**SMALL, out=str(out)))
    return out


def stopped_once(monkeypatch: pytest.MonkeyPatch, request: RunRequest) -> None:
    real = EpochLoop._asked_to_stop

    def stopping(loop: EpochLoop) -> bool:
        if (loop.progress.epoch, loop.progress.batch) == (1, 1):
            loop.stops.by = "SIGUSR1"
        return real(loop)

    with monkeypatch.context() as patched:
        patched.setattr(EpochLoop, "_asked_to_stop", stopping)
        with pytest.raises(Interrupted) as stopped:
            train_or_resume(request)
    assert stopped.value.by == "SIGUSR1"


def test_begun_continued_and_shown(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "run"
    request = RunRequest(**SMALL, out=str(out))
    stopped_once(monkeypatch, request)
    summary = train_or_resume(request)
    same(out, whole)
    capsys.readouterr()
    files = {path: path.read_bytes() for path in out.rglob("*.*")}
    again = train_or_resume(request)
    assert again["last"] == summary["last"]
    said = capsys.readouterr().out
    assert f"{out} has finished" in said
    assert "pgd-20" in said
    assert {path: path.read_bytes() for path in out.rglob("*.*")} == files


def test_without_a_folder_it_is_the_usual_one(fastadv_command: Any) -> None:
    words = COMMAND.split()
    for _ in range(2):
        assert fastadv_command(*words).code == 0
    assert [path.name for path in Path("runs").iterdir()] == ["fast-digits"]
    # A folder without a run is as good as none.
    shutil.rmtree("runs/fast-digits")
    Path("runs/fast-digits").mkdir()
    assert fastadv_command(*words).code == 0
    assert Path("runs/fast-digits/summary.json").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 3}, r"--seed 3 \(there: 0\)"),
        ({"eps": "0.2"}, r"--eps 0.2 \(there: 0.1\)"),
        ({"max_grad_norm": 1.0}, r"--max-grad-norm 1 \(there: not set\)"),
        ({"options": {"regularizer": "igr"}}, r"--regularizer igr \(there: none\)"),
        ({"flip": True}, r"--flip \(there: --no-flip\)"),
        ({"epochs": 3, "lr": 0.5}, r"--epochs 3 \(there: 2\), --lr 0.5"),
    ],
)
def test_other_settings_are_named_and_refused(
    whole: Path, change: dict[str, Any], said: str
) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*.*")}
    with pytest.raises(UserError, match=said):
        train_or_resume(RunRequest(**SMALL | change, out=str(whole)))
    assert {path: path.read_bytes() for path in whole.rglob("*.*")} == before


def test_what_a_finished_run_was_tested_with_is_not_another_now(whole: Path) -> None:
    said = rf"--test-limit 9 \(there: 20\).* \(fastadv evaluate {whole}\)"
    with pytest.raises(UserError, match=said):
        train_or_resume(RunRequest(**SMALL | {"test_limit": 9}, out=str(whole)))


def test_a_run_that_goes_on_is_evaluated_as_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = tmp_path / "run"
    stopped_once(monkeypatch, RunRequest(**SMALL, out=str(out)))
    same_mode = 'mode = "eager"' in (out / "config.toml").read_text()
    capsys.readouterr()
    changes = {"test_limit": 9, "mode": "eager", "test_attacks": "fgsm"}
    summary = train_or_resume(RunRequest(**SMALL | changes, out=str(out)))
    assert (summary["n"], list(summary["last"])) == (9, ["fgsm"])
    said = " ".join(capsys.readouterr().out.split())
    assert "change no weights: test_attacks clean,pgd-20 before, fgsm now; test_limit 20" in said
    # The file says how the run was tested, and still on what it was begun.
    text = (out / "config.toml").read_text()
    assert ("test_limit = 9\n" in text, 'mode = "eager"' in text) == (True, same_mode)
    assert train_or_resume(RunRequest(**SMALL | changes, out=str(out))) == summary
    with pytest.raises(UserError, match=r"--test-limit 20 \(there: 9\)"):
        train_or_resume(RunRequest(**SMALL, out=str(out)))


def test_what_is_not_said_and_what_belongs_to_the_invocation_may_differ(whole: Path) -> None:
    settings = {"checkpoint_minutes": 0.5, "device": "cpu", "download": True}
    settings |= {"batch_size": "auto", "mode": "auto"}  # what was measured is stored
    found = train_or_resume(RunRequest(method="fast", eps="1/10", out=str(whole), **settings))
    assert found["n"] == 20


def test_settings_of_the_invocation_hold_when_it_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    stopped_once(monkeypatch, RunRequest(**SMALL, out=str(out)))
    seen: list[float] = []
    real = EpochLoop.epochs

    def noting(loop: EpochLoop) -> None:
        seen.append(loop.session.config.checkpoint_minutes)
        real(loop)

    monkeypatch.setattr(EpochLoop, "epochs", noting)
    train_or_resume(RunRequest(**SMALL, checkpoint_minutes=0.25, out=str(out)))
    assert seen == [0.25]
