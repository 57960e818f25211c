"""``fastadv-torchrun``: one sentence for all processes, and their exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

WORDS = "--method fast --width 2 --limit 320 --batch-size 32 --epochs 300 --mode eager --out run"


def begun(place: Path, words: str, launcher: str = "fastadv.cli.torchrun") -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", launcher, "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [*command, "-m", "fastadv", *words.split()],
        cwd=place,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def children(process: int) -> list[int]:
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = each.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == process:
            found.append(int(each.parent.name))
    return found


def wait_for(path: Path) -> None:
    until = time.monotonic() + 120
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("train --nonsense", "error: Unknown option '--nonsense'"),
        ("train --data folder:/nowhere", "error: folder:/nowhere cannot be read"),
    ],
)
def test_a_mistake_is_one_sentence(words: str, said: str, tmp_path: Path) -> None:
    process = begun(tmp_path, words)
    _, errors = process.communicate(timeout=120)
    (sentence,) = errors.splitlines()
    assert sentence.startswith(said)
    assert process.returncode == 2


def test_torchrun_itself_adds_its_page_only(tmp_path: Path) -> None:
    process = begun(tmp_path, "train --data folder:/nowhere", "torch.distributed.run")
    _, errors = process.communicate(timeout=120)
    assert errors.count("error: folder:/nowhere cannot be read") == 1
    assert "[rank" not in errors
    assert "exitcode  : 2" in errors


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others_with_one_sentence(victim: int, tmp_path: Path) -> None:
    process = begun(tmp_path, f"train {WORDS} --resume auto")
    wait_for(tmp_path / "run" / "last.pt")
    os.kill(sorted(children(process.pid))[victim], signal.SIGKILL)
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 30
    (sentence,) = errors.splitlines()
    assert sentence.startswith(f"error: Process {victim} has ended without a word")
    assert process.returncode == 75


@pytest.mark.parametrize(("name", "code"), [("SIGUSR1", 75), ("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_saves_in_all_processes(name: str, code: int, tmp_path: Path) -> None:
    process = begun(tmp_path, f"train {WORDS}")
    wait_for(tmp_path / "run" / "last.pt")
    time.sleep(0.3)
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    (sentence,) = errors.splitlines()
    assert sentence.startswith("Stopped by ")
    assert sentence.endswith(
        "continue with: fastadv-torchrun --nproc-per-node 2 -m fastadv train --resume run"
    )
