"""A run that is told to stop in the middle of a long update or evaluation does not wait for its
end; it loses nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from test_resume import same

from fastadv.engine.process import stop
from fastadv.errors import Interrupted
from fastadv.evaluation.search.passes import Passes
from fastadv.run.onward import train_or_resume
from fastadv.run.request import RunRequest
from fastadv.run.schedules import Schedule

SMALL: dict[str, Any] = {
    "method": "apart",
    "epochs": 2,
    "limit": 128,
    "batch_size": 32,
    "width": 2,
    "test_limit": 20,
    "mode": "eager",
    "dropout": 0.2,
    "options": {"averaging": "ema"},
}
LONG = 20.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("within") / "whole"
    train_or_resume(RunRequest(**SMALL, out=str(out)))
    return out


def stopped_in(
    monkeypatch: pytest.MonkeyPatch, request: RunRequest, owner: Any, name: str, number: int
) -> Interrupted:
    """What ends the run of ``request`` if call ``number`` of ``owner.name`` is a long one, in which
    SIGTERM comes."""
    real, calls = getattr(owner, name), 0

    def long(*words: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(LONG)
        return real(*words, **options)

    with monkeypatch.context() as patched:
        patched.setattr(stop, "GRACE", 0.2)
        patched.setattr(owner, name, long)
        began = time.monotonic()
        with pytest.raises(Interrupted, match="Stopped by SIGTERM; continue with") as stopped:
            train_or_resume(request)
        assert time.monotonic() - began < LONG
    return stopped.value


def test_an_update_is_undone_and_made_again(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    request = RunRequest(**SMALL, out=str(out))
    assert stopped_in(monkeypatch, request, Schedule, "__call__", 3).by == "SIGTERM"
    assert (out / "last.pt").exists()
    train_or_resume(request)
    same(out, whole)


# After the first epoch, in the final test.
@pytest.mark.parametrize("number", [3, pytest.param(8, marks=pytest.mark.slow), 25])
def test_an_evaluation_goes_on(
    number: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    request = RunRequest(**SMALL, out=str(out))
    told: list[str] = []
    monkeypatch.setattr(stop, "note_progress", lambda: told.append(sys._getframe(1).f_code.co_name))
    stopped_in(monkeypatch, request, Passes, "gradient", number)
    assert "_is_further" in told or number == 3  # the first batch has no verdict yet
    train_or_resume(request)
    same(out, whole)


def test_the_first_update_of_a_run_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may compile for minutes."""

    def long(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(LONG)

    monkeypatch.setattr(Schedule, "__call__", long)
    began = time.monotonic()
    with pytest.raises(stop.Stopped, match="SIGUSR1"):
        train_or_resume(RunRequest(**SMALL, out=str(tmp_path / "run")))
    assert time.monotonic() - began < LONG
    assert not (tmp_path / "run").exists()
