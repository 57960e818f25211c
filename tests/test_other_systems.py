"""What Windows and macOS lack, taken away: no traceback, and what cannot be done is said once."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest

from fastadv.engine.process import memory
from fastadv.errors import UserError
from fastadv.storage import files, trust
from fastadv.storage.lock import Lock

WITHOUT = """
import os, signal, sys
sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["pwd"] = None
for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "sysconf", "getuid", "link",
             "posix_fallocate"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU", "SIGKILL"):
    delattr(signal, name)
own_open = os.open
def no_folders(path, flags, *more, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied")
    return own_open(path, flags, *more, **options)
os.open = no_folders
"""

IMPORT_ALL = """
import importlib, pkgutil
import fastadv
for module in pkgutil.walk_packages(fastadv.__path__, "fastadv."):
    if not module.name.endswith("__main__") and ".benchmark" not in module.name:
        importlib.import_module(module.name)
"""

RUN = """
from fastadv.cli.main import main
words = "--method fast --width 2 --epochs 2 --limit 48 --test-limit 8 --mode eager"
def call(*words):
    sys.argv = ["fastadv", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, end.code
call("train", *words.split(), "--select-attack", "clean", "--test-attacks", "clean", "--out", "run")
call("train", "--resume", "run")
call("evaluate", "run", "--attacks", "fgsm")
call("export", "run", "--out", "model.safetensors")
call("doctor")
"""


def python(body: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT + body],
        capture_output=True, text=True, cwd=folder, env=environment, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_every_module_is_imported_there(tmp_path: Path) -> None:
    done = python(IMPORT_ALL, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_a_run_goes_through_there(tmp_path: Path) -> None:
    done = python(RUN, tmp_path)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.count("does not say how much memory") <= 1
    assert not (tmp_path / "run" / "lock").exists()
    assert (tmp_path / "run" / "previous.pt").exists()


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_open, own_sync = os.open, os.fsync

    def refused(path: object, flags: int, *more: int) -> int:
        if os.path.isdir(path):  # type: ignore[arg-type]
            raise PermissionError(13, "Permission denied")
        return own_open(path, flags, *more)  # type: ignore[call-overload, no-any-return]

    def invalid(handle: int) -> None:
        if not os.path.isfile(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        own_sync(handle)

    for name, stand_in in (("open", refused), ("fsync", invalid)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, stand_in)
            with files.replaced(tmp_path / name) as file:
                file.write(b"x")
        assert (tmp_path / name).read_bytes() == b"x"
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        with pytest.raises(UserError, match="not a regular file"):
            files.read(tmp_path, 10)


def test_unknown_memory_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sysconf")
    monkeypatch.setattr(memory, "_LIMITS", ())
    memory._assumed.cache_clear()
    with pytest.warns(UserWarning, match="8 GB are assumed"):
        assert memory.machine_memory() == 8 << 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert memory.machine_memory() == 8 << 30
    memory._assumed.cache_clear()


def test_what_a_process_takes_where_the_system_says_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = Mock(RUSAGE_SELF=0, RLIMIT_AS=9, RLIM_INFINITY=-1)
    usage.getrusage.return_value.ru_maxrss = 3000
    usage.getrlimit.return_value = (-1, -1)
    for name in ("_STATUS", "_CLEAR", "_MACHINE"):
        monkeypatch.setattr(memory, name, tmp_path / "not" / "there")
    monkeypatch.setattr(memory, "machine_memory", lambda: 10_000)
    for system, unit, left in (("darwin", 1, 7000), ("freebsd", 1024, 0)):
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(memory, "resource", usage)
        assert (memory.peak(), memory.free()) == (3000 * unit, left)
    monkeypatch.setattr(memory, "resource", None)  # Windows
    assert (memory.peak(), memory.free()) == (None, 10_000)
    assert memory.resident() is None
    assert not memory.forget_peak()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says it")
def test_what_a_process_takes_on_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    before, most = memory.resident(), memory.peak()
    assert before is not None
    assert most is not None
    assert 2**26 < before <= most < 2**40  # it has imported torch
    if memory.forget_peak():
        with mmap.mmap(-1, size := 2**25) as content:  # given back at once
            content.write(b"x" * size)
            most = memory.peak()
        memory.forget_peak()
        assert memory.peak() < most - 0.9 * size  # type: ignore[operator]
    assert 0 < memory.free() <= memory.machine_memory()
    addresses = memory._stated(memory._STATUS, "VmSize")
    assert addresses is not None
    limit = Mock(RLIMIT_AS=9, RLIM_INFINITY=-1, getrlimit=lambda _: (addresses + 2**20, -1))
    monkeypatch.setattr(memory, "resource", limit)
    assert memory.free() <= 2**20


def test_a_key_without_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "getuid")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    trust.remember(tmp_path, b"x")
    (tmp_path / "fastadv" / "key").chmod(0o666)
    assert trust.is_own(tmp_path, b"x")


def test_a_process_that_cannot_be_looked_at_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows ``os.kill(pid, 0)`` would end it."""
    from fastadv.storage import lock

    first, second = (Lock(tmp_path / "lock", "trains") for _ in range(2))
    monkeypatch.setattr(lock, "fcntl", None)
    monkeypatch.setattr(lock, "_can_look", lambda: False)
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a process was sent a signal"))
    first.take()
    with pytest.raises(UserError, match=r"if it has ended, delete .*lock"):
        second.take()
    first.release()
    second.take()
    second.release()
