"""A signal in the first seconds of a command: imports, data, building, compiling."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TRAIN = "train --method fast --limit 96 --width 2 --epochs 200 --mode eager --out run"
MOMENTS = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0]
STARTED = 0.3  # seconds until Python has come to our first line, on a loaded machine too


def ended(
    words: str, name: str, after: float, place: Path
) -> tuple[subprocess.CompletedProcess[str], float]:
    """The command with the signal called ``name`` ``after`` so many seconds, and the seconds until
    its end."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fastadv", *words.split()],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=place,
    )
    time.sleep(after)
    process.send_signal(getattr(signal, name))
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - began
    return subprocess.CompletedProcess([], process.returncode, out, err), took


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_it_leaves_a_sentence_and_an_exit_code(name: str, tmp_path: Path) -> None:
    expected = 130 if name == "SIGINT" else 75
    for after in MOMENTS:
        words = f"{TRAIN} --resume auto"
        done, took = ended(words, name, after, tmp_path)
        assert took < 10
        if after < STARTED and not done.stderr.startswith("Stopped"):
            # Python itself was starting: its own end by a signal, or its own traceback.
            assert done.returncode in (-getattr(signal, name), 1, 130)
            assert "start.py" not in done.stderr
            continue
        assert (after, done.returncode) == (after, expected), done.stderr
        (sentence,) = done.stderr.splitlines()
        assert sentence.startswith(f"Stopped by {name}; ")
        assert sentence.endswith(("start it again.", "fastadv train --resume run"))


def test_evaluate_too(tmp_path: Path) -> None:
    words = "train --method fast --limit 96 --width 2 --epochs 1 --test-limit 8 --out run"
    command = [sys.executable, "-P", "-m", "fastadv", *words.split(), "--mode", "eager"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for after in (0.4, 1.0, 2.0, 3.0, 5.0):
        done, took = ended("evaluate run --attacks pgd-2000-20", "SIGUSR1", after, tmp_path)
        assert (after, done.returncode) == (after, 75), done.stderr
        assert took < 10
        assert done.stderr.splitlines()[-1].startswith("Stopped by SIGUSR1")
        assert "Traceback" not in done.stderr
