"""Shared by all tests: where commands run, and a run of the command line without a process."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest


def pytest_configure() -> None:
    """One thread a worker: as many processes as cores run the tests. Notes about the run folders
    of tests stay away from the user's."""
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="fastadv-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


class Outcome:
    """What a command left: exit code, standard output and error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def fastadv_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """``fastadv_command("train", "--epochs", 1)`` in an empty folder."""
    from fastadv.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fastadv", *map(str, words)])
        with pytest.raises(SystemExit) as exit_code:
            main()
        captured = capsys.readouterr()
        return Outcome(int(exit_code.value.code or 0), captured.out, captured.err)

    return run
