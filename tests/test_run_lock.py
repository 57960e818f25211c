"""One process trains in a folder; the lock of a dead one is no hindrance."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from fastadv.errors import UserError
from fastadv.storage import lock as module
from fastadv.storage.lock import Lock

BODY = """
import sys, time
from pathlib import Path
from fastadv.errors import UserError
from fastadv.storage import lock
if sys.argv[2] == "file":
    lock.fcntl = None
own = lock.Lock(Path(sys.argv[1]), "trains")
print("ready", flush=True)
sys.stdin.readline()
try:
    own.take()
except UserError as error:
    print("refused", error, flush=True)
    sys.exit(3)
print("taken", flush=True)
sys.stdin.readline()
own.release()
"""


def process(path: Path, kind: str) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", BODY, str(path), kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert said(started) == "ready"
    return started


def said(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    return running.stdout.readline().strip()


def go_on(running: subprocess.Popen[str]) -> None:
    assert running.stdin is not None
    running.stdin.write("\n")
    running.stdin.flush()


@pytest.fixture(params=["system", "file"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's locks, and without."""
    if request.param == "file":
        monkeypatch.setattr(module, "fcntl", None)
    return str(request.param)


def test_the_second_is_told_who_the_first_is(tmp_path: Path, kind: str) -> None:
    first, path = process(tmp_path / "lock", kind), tmp_path / "lock"
    go_on(first)
    assert said(first) == "taken"
    with pytest.raises(UserError) as caught:
        Lock(path, "trains in RUN").take()
    sentence = str(caught.value)
    assert f"Another process trains in RUN: process {first.pid} on {socket.gethostname()}" in (
        sentence
    )
    assert "delete" not in sentence  # the process is here and alive
    go_on(first)
    first.wait()
    assert not list(tmp_path.iterdir())
    own = Lock(path, "trains in RUN")
    own.take()
    own.take()  # it has it
    own.release()
    own.release()
    assert not list(tmp_path.iterdir())


def test_a_killed_process_leaves_no_lock(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "lock"
    for _ in range(3):
        first = process(path, kind)
        go_on(first)
        assert said(first) == "taken"
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert json.loads(path.read_text())["pid"] == first.pid
        own = Lock(path, "trains in RUN")
        own.take()
        assert json.loads(path.read_text())["pid"] == os.getpid()
        own.release()
        assert not list(tmp_path.iterdir())


def test_of_two_at_once_one_gets_it(tmp_path: Path, kind: str) -> None:
    """Also the lock that a dead process left."""
    path = tmp_path / "lock"
    for number in range(4):
        if number % 2:
            dead = process(path, kind)
            go_on(dead)
            said(dead)
            dead.kill()
            dead.wait()
        both = [process(path, kind) for _ in range(2)]
        for each in both:
            go_on(each)
        words = [said(each) for each in both]
        assert sorted(word.partition(" ")[0] for word in words) == ["refused", "taken"], words
        for each, word in zip(both, words, strict=True):
            if word == "taken":
                go_on(each)
            each.wait()
        assert not list(tmp_path.iterdir())


def write(path: Path, **changed: object) -> dict[str, object]:
    owner = module._this_process() | changed
    path.write_text(json.dumps(owner))
    return owner


@pytest.mark.parametrize(
    "changed", [{"boot": "another"}, {"pid": 2**22 + 5}, {"pid": 1, "started": "0"}]
)
def test_a_process_that_ended_before_is_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: dict[str, object]
) -> None:
    """The computer was started again, the number is free, or it belongs to a later process."""
    monkeypatch.setattr(module, "fcntl", None)
    write(tmp_path / "lock", **changed)
    Lock(tmp_path / "lock", "trains").take()


@pytest.mark.parametrize("system", [True, False])
def test_a_lock_of_another_computer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: bool
) -> None:
    """Only the system can say that it is free."""
    path = tmp_path / "lock"
    write(path, host="elsewhere", pid=7)
    if system:
        Lock(path, "trains").take()
        return
    monkeypatch.setattr(module, "fcntl", None)
    with pytest.raises(UserError, match=r"process 7 on elsewhere, .* if it has ended, delete .*"):
        Lock(path, "trains").take()
    assert json.loads(path.read_text())["host"] == "elsewhere"


def test_a_lock_without_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash while it was written; what is new may still be written."""
    monkeypatch.setattr(module, "fcntl", None)
    path = tmp_path / "lock"
    path.write_bytes(b'{"pid"')
    os.utime(path, (time.time() - 60,) * 2)
    Lock(path, "trains").take()
    path.write_bytes(b"")
    monkeypatch.setattr(module, "_ATTEMPTS", 2)
    with pytest.raises(UserError, match="Another process trains"):
        Lock(path, "trains").take()


def test_names_in_a_lock_are_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "fcntl", None)
    write(tmp_path / "lock", host="\x1b]0;owned\x07", pid="\x1b[2J")
    with pytest.raises(UserError) as caught:
        Lock(tmp_path / "lock", "trains").take()
    assert str(caught.value).isprintable()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as some network file systems: the file is the lock."""

    def none(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", none)
    own = Lock(tmp_path / "lock", "trains")
    own.take()
    with pytest.raises(UserError, match=f"process {os.getpid()} on"):
        Lock(tmp_path / "lock", "trains").take()
    own.release()
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_through_a_link(tmp_path: Path, kind: str) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "lock"
    path.symlink_to(outside)
    with suppress(OSError):
        Lock(path, "trains").take()  # in place of the link, or not at all
    assert outside.read_text() == "mine"
