"""Several processes in one run folder: one trains, the others are refused or read whole files."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_runs import SETTINGS, begun, require_same

from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.finished import evaluate_run
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint

FORKING = multiprocessing.get_context("fork")
SECONDS = 120


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    train(RunRequest(**SETTINGS, out=str(out)), Console())
    return out


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return begun(tmp_path_factory.mktemp("runs") / "run", patch, 2)


def _child(act: Callable[[], Any], barrier: Any, sender: Any) -> None:
    torch.set_num_threads(1)
    signal.alarm(SECONDS)
    barrier.wait()
    try:
        act()
        sender.send("ended")
    except UserError as error:
        sender.send(f"refused: {error}")
    except BaseException:
        sender.send(traceback.format_exc())


def at_once(*acts: Callable[[], Any]) -> list[tuple[int, str]]:
    """Process number and outcome of each of ``acts``, which begin together."""
    barrier, running = FORKING.Barrier(len(acts)), []
    for act in acts:
        receiver, sender = FORKING.Pipe(duplex=False)
        child = FORKING.Process(target=_child, args=(act, barrier, sender))
        child.start()
        running.append((child, receiver))
    found = []
    for child, receiver in running:
        assert receiver.poll(SECONDS)
        found.append((child.pid or 0, receiver.recv()))
        child.join(10)
    return found


def require_one(found: list[tuple[int, str]], out: Path, whole: Path) -> None:
    """One process ended the run; the other was refused, or came when it was over."""
    words = [outcome for _, outcome in found]
    assert "ended" in words, words
    for _, outcome in found:
        if outcome == "ended":
            continue
        assert outcome.startswith("refused: "), outcome
        others = [f"process {pid} on " for pid, _ in found]
        told = any(other in outcome for other in others) or "already holds a run" in outcome
        assert told, outcome
    require_same(out, whole)
    assert not (out / "lock").exists()
    assert not [path for path in out.iterdir() if ".partial" in path.name]


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_two_resumes_at_once(tmp_path: Path, interrupted: Path, whole: Path, rounds: int) -> None:
    for number in range(rounds):
        out = tmp_path / str(number)
        shutil.copytree(interrupted, out)
        found = at_once(*[lambda out=out: resume(str(out), Console())] * 2)
        require_one(found, out, whole)


def test_two_new_runs_in_one_folder(tmp_path: Path, whole: Path) -> None:
    for number in range(2):
        out = tmp_path / str(number)
        request = RunRequest(**SETTINGS, out=str(out))
        found = at_once(*[lambda request=request: train(request, Console())] * 2)
        require_one(found, out, whole)


def test_a_killed_run_is_resumed_at_once(tmp_path: Path, interrupted: Path, whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(interrupted, out)
    barrier, (receiver, sender) = FORKING.Barrier(1), FORKING.Pipe(duplex=False)
    first = FORKING.Process(
        target=_child, args=(lambda: resume(str(out), Console()), barrier, sender)
    )
    first.start()
    while not (out / "lock").exists():
        time.sleep(0.001)
    os.kill(first.pid or 0, signal.SIGKILL)
    first.join()
    assert (out / "lock").exists()
    resume(str(out), Console())
    require_same(out, whole)
    assert not receiver.poll(0)


def test_a_run_is_evaluated_while_it_trains(tmp_path: Path, interrupted: Path, whole: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(interrupted, out)

    def read() -> None:
        folder = RunFolder.open(str(out))
        while folder.read_summary() is None:
            for file in (folder.last, folder.previous, folder.best):
                checkpoint.load(file)
            folder.read_config()
            folder.read_metrics()
            assert evaluate_run(str(out), "clean", which="last", limit=8).n == 8

    found = at_once(lambda: resume(str(out), Console()), read)
    assert [outcome for _, outcome in found] == ["ended", "ended"], found
    require_same(out, whole)
