"""Runs jobs one after another, each in its own process that is forked from this one.

A capture that fails may break all later ones of its process, so that each job needs a process.
Importing PyTorch takes longer than many jobs, so the process that forks has imported everything and
has not used the device. Each result is written at once, one line of JSON per job, so that an
interrupted run continues.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def each(
    names: Sequence[str], work: Callable[[str], Result], kept: Path, digest: str, limit: float
) -> dict[str, Result]:
    """The result of ``work`` for every name; those in ``kept`` with this ``digest`` are reused.

    The result of a job that fails, or takes longer than ``limit`` seconds, contains "failed"; the
    next run tries it again. The output of a job is stored in a folder next to ``kept``.
    """
    kept.parent.mkdir(parents=True, exist_ok=True)
    found = _read(kept, digest)
    waiting = [name for name in names if name not in found or "failed" in found[name]]
    if len(waiting) < len(names):
        print(f"{len(names) - len(waiting)} of {len(names)} are done by an earlier run")
    began = time.monotonic()
    for number, name in enumerate(waiting):
        since = time.monotonic()
        result = _one(name, work, kept.with_suffix(".logs") / f"{name}.txt", limit)
        result["seconds"] = round(time.monotonic() - since, 1)
        found[name] = result
        with kept.open("a") as file:
            file.write(json.dumps({"digest": digest, "name": name, "result": result}) + "\n")
        left = (time.monotonic() - began) / (number + 1) * (len(waiting) - number - 1)
        print(
            f"{number + 1}/{len(waiting)} {name}: {_told(result)}, {result['seconds']:.0f} s; "
            f"about {left / 60:.0f} min left",
            flush=True,
        )
    return {name: found[name] for name in names}


def _told(result: Result) -> str:
    for word in ("failed", "refused"):
        if word in result:
            return f"{word}: {result[word][:160]}"
    return "fine"


def _read(kept: Path, digest: str) -> dict[str, Result]:
    if not kept.exists():
        return {}
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    return {line["name"]: line["result"] for line in lines if line["digest"] == digest}


def _one(name: str, work: Callable[[str], Result], log: Path, limit: float) -> Result:
    log.parent.mkdir(parents=True, exist_ok=True)
    answer = log.with_suffix(".json")
    answer.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _in_the_child(name, work, log, answer)
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return {"failed": f"took longer than {limit:.0f} s"}
        time.sleep(0.02)
    if not answer.exists():
        return {"failed": f"the process ended with status {status}, see {log.name}"}
    result: Result = json.loads(answer.read_text())
    answer.unlink()
    return result


def _in_the_child(name: str, work: Callable[[str], Result], log: Path, answer: Path) -> None:
    """Run the job and end the process at once, without the parent's clean-up at exit."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        result = work(name)
    except BaseException as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        result = {"failed": f"{type(error).__name__}: {first}"}
    written = answer.with_suffix(".part")
    written.write_text(json.dumps(result))
    written.rename(answer)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
