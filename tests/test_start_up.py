"""How long the command line takes before it does anything."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MOST_SECONDS = 0.5
TRIES = 3  # the best one counts: the first may have to compile and read files


def cpu_seconds(*words: str) -> float:
    """What a whole process computes, which is what a user waits for it on an idle machine."""
    found = []
    for _ in range(TRIES):
        command = [sys.executable, "-P", *words]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
            _, status, used = os.wait4(running.pid, 0)
            running.returncode = os.waitstatus_to_exitcode(status)
        assert running.returncode == 0
        found.append(used.ru_utime + used.ru_stime)
    return min(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [("--help",), ("train", "--help"), ("bench", "--help"), ("bench", "--schema")]
)
def test_help_is_there_at_once(words: tuple[str, ...]) -> None:
    assert cpu_seconds("-m", "fastadv", *words) <= MOST_SECONDS


@pytest.mark.slow
def test_the_package_is_imported_at_once() -> None:
    assert cpu_seconds("-c", "import fastadv") <= MOST_SECONDS


def test_the_package_is_imported_without_torch() -> None:
    code = "import fastadv, sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], timeout=60).returncode == 0
