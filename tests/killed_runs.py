"""Runs that are killed at any moment and begun again by the same call.

Processes are forked by the server of ``two_processes``, which has imported everything.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing
from two_processes import IMPORTED

GONE_AFTER = 30.0  # seconds in which the others end that have lost a process
LONGEST = 300.0


@dataclass(frozen=True)
class Kill:
    """SIGKILL for process ``rank`` (None: for all of them), ``after`` so many seconds, or at call
    number ``after`` of one of ``PLACES``."""

    after: float
    place: str | None = None
    rank: int | None = None


def _counted(owner: Any, name: str, number: int, *, when: str) -> None:
    """Let this process be killed at call ``number`` of ``owner.name``, before or after it."""
    real, calls = getattr(owner, name), 0

    def call(*words: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        found = real(*words, **options)
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(owner, name, call)


def _within_a_file(number: int) -> None:
    """While file ``number`` is written: last.pt, best.pt, a line of metrics.jsonl, verdicts, ..."""
    _counted(os, "fsync", number, when="before")


def _between_files(number: int) -> None:
    """After file ``number`` has got its name: of last.pt and metrics.jsonl one is old."""
    _counted(os, "replace", number, when="after")


def _within_an_evaluation(number: int) -> None:
    from fastadv.run import eval_watch

    eval_watch.KEEP_EVERY = 0.0
    _counted(eval_watch.Watch, "look", number, when="before")


def _within_an_update(number: int) -> None:
    from fastadv.run.schedules import Schedule

    _counted(Schedule, "__call__", number, when="before")


def _within_the_final_test(number: int) -> None:
    from fastadv.run import epoch_loop

    real = epoch_loop.EpochLoop.final_test

    def final(loop: Any) -> Any:
        _within_an_evaluation(number)
        return real(loop)

    epoch_loop.EpochLoop.final_test = final  # type: ignore[method-assign]


PLACES = {
    "within a file": _within_a_file,
    "between files": _between_files,
    "within an evaluation": _within_an_evaluation,
    "within an update": _within_an_update,
    "within the final test": _within_the_final_test,
}


def _train(
    rank: int, world: int, port: int, settings: dict[str, Any], out: str, kill: Kill | None
) -> None:
    for stream in (1, 2):
        os.dup2(os.open(f"{out}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    torch.set_num_threads(1)
    if world > 1:
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ.update(shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    if kill is not None and kill.place is not None and kill.rank in (None, rank):
        PLACES[kill.place](int(kill.after))
    from fastadv.errors import ProcessLost
    from fastadv.run.onward import train_or_resume
    from fastadv.run.request import RunRequest

    try:
        train_or_resume(RunRequest(**settings, out=out))
    except ProcessLost as error:
        print(error, file=sys.stderr)
        os._exit(75)


def trained(
    settings: dict[str, Any], out: Path, world: int = 1, kill: Kill | None = None
) -> list[int]:
    """The exit codes of the processes of one call; fails if one outlives a killed one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*IMPORTED, "fastadv.run.onward", "fastadv.run.schedules"])
    processes: list[BaseProcess] = [
        context.Process(target=_train, args=(rank, world, port, settings, str(out), kill))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    if kill is not None and kill.place is None:
        processes[0].join(kill.after)
        for rank, process in enumerate(processes):
            if kill.rank in (None, rank):
                process.kill()
    until = time.monotonic() + LONGEST
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):
            until = min(until, time.monotonic() + GONE_AFTER)
        assert time.monotonic() < until, "a process did not end"
        time.sleep(0.02)
    return [process.exitcode or 0 for process in processes]


def killed_and_finished(
    settings: dict[str, Any], out: Path, kills: list[Kill], world: int = 1
) -> int:
    """Train with ``kills``, then until the end; the number of kills that came before the end."""
    hit = 0
    for kill in kills:
        codes = trained(settings, out, world, kill)
        said = Path(f"{out}.log").read_text()
        assert set(codes) <= {0, 75, -signal.SIGKILL}, said
        hit += -signal.SIGKILL in codes
    assert trained(settings, out, world) == [0] * world, Path(f"{out}.log").read_text()
    return hit
