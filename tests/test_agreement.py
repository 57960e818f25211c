"""Processes that were not started alike are told so, in one sentence, before they train."""

from __future__ import annotations

import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from two_processes import in_two_processes

from fastadv.errors import ProcessLost, UserError

SETTINGS: dict[str, Any] = {
    "method": "fast",
    "epochs": 1,
    "limit": 64,
    "batch_size": 32,
    "width": 2,
    "test_limit": 8,
    "mode": "eager",
    "device": "cpu",
}


def join(rank: int, port: int) -> None:
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def worker(rank: int, port: int, folder: str, changes: list[dict[str, Any]]) -> None:
    join(rank, port)
    from fastadv.run import agreement
    from fastadv.run.request import RunRequest
    from fastadv.run.session import Session
    from fastadv.run.train import train

    change = dict(changes[rank])
    if "code" in change:
        code = change.pop("code")
        agreement._code = lambda: code
    if "data" in change:
        digest = change.pop("data")
        Session.digests = lambda self: {"training data": digest}  # type: ignore[method-assign]
    try:
        train(RunRequest(**SETTINGS | change, out=f"{folder}/run"))
        said = "trained"
    except UserError as error:
        said = str(error)
    Path(folder, f"said {rank}").write_text(said)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "--seed is 0 in process 0 and 1 in process 1"),
        ({"options": {"averaging": "ema"}}, "--averaging is none in process 0 and ema in process"),
        ({"lr": 0.5}, "--lr is "),
        ({"code": "edited"}, "the code of fastadv is "),
        ({"data": "other"}, "training data is "),
    ],
)
def test_what_differs_is_named_in_both(change: dict[str, Any], said: str, tmp_path: Path) -> None:
    in_two_processes(worker, free_port(), str(tmp_path), [{}, change])
    sentences = {(tmp_path / f"said {rank}").read_text() for rank in range(2)}
    (sentence,) = sentences
    assert sentence.startswith("The processes must be started alike, and ")
    assert said in sentence
    assert not (tmp_path / "run").exists()


def test_paths_may_be_others(tmp_path: Path) -> None:
    changes = [{"data_root": str(tmp_path)}, {"data_root": str(tmp_path / "other")}]
    in_two_processes(worker, free_port(), str(tmp_path), changes)
    assert [(tmp_path / f"said {rank}").read_text() for rank in range(2)] == ["trained"] * 2


# -- a process that is gone -----------------------------------------------------------------------


def lonely(rank: int, port: int, folder: str) -> None:
    join(rank, port)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of multiprocessing, when one has ended
    import torch

    from fastadv.engine.process import distributed

    said = "nothing"
    try:
        with distributed.joined(torch.device("cpu")):
            distributed.wait()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            began = time.monotonic()
            try:
                distributed.told_by_all("", timedelta(minutes=5))
            except ProcessLost as error:
                said = f"{time.monotonic() - began < 10} {error}"
            try:
                distributed.wait()
            except ProcessLost as error:
                said += f"\n{error}"
    finally:
        if rank == 0:
            Path(folder, "said").write_text(said)


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="SIGKILL"):
        in_two_processes(lonely, free_port(), str(tmp_path))
    until = time.monotonic() + 20
    while not (tmp_path / "said").exists() and time.monotonic() < until:
        time.sleep(0.05)
    first, second = (tmp_path / "said").read_text().splitlines()
    assert first.startswith("True Process 1 has ended without a word")
    assert second.startswith("Process 1 has ended without a word")
