"""A signal in the first seconds of a command: imports, data, building, compiling."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TRAIN = "train --method fast --limit 96 --width 2 --epochs 200 --mode eager --out run"
MOMENTS = [0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 2.5, 3.0, 4.0]
MOST_COMPUTING = 0.1  # seconds until signals are handled, Python's own start included: see the page


def handles_signals(pid: int) -> bool:
    """True once the process is no longer Python alone, which leaves SIGTERM to the system."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def ended(
    words: str, name: str, after: float, place: Path
) -> tuple[subprocess.CompletedProcess[str], float, bool]:
    """The command with the signal called ``name`` ``after`` so many seconds, the seconds until its
    end, and whether it handled signals."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fastadv", *words.split()],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=place,
    )
    time.sleep(after)
    handled = handles_signals(process.pid)
    process.send_signal(getattr(signal, name))
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    took = time.monotonic() - began
    return subprocess.CompletedProcess([], process.returncode, out, err), took, handled


def test_they_are_handled_soon() -> None:
    code = (
        "from fastadv.engine.process import stop\n"
        "import os, signal, sys, time\n"
        "with stop.handled(command=True):\n"
        "    print(time.process_time())\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    command = [sys.executable, "-P", "-c", code]
    took = []
    for _ in range(5):  # the first may have to compile and read files
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stderr.splitlines()[-1].endswith("Stopped: SIGTERM")
        took.append(float(done.stdout))
    assert min(took) < MOST_COMPUTING
    page = Path(__file__).parents[1] / "docs" / "running-on-a-cluster.md"
    assert "which takes a tenth of a second of computing at most" in " ".join(
        page.read_text().split()
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_it_leaves_a_sentence_and_an_exit_code(name: str, tmp_path: Path) -> None:
    expected = 130 if name == "SIGINT" else 75
    for after in MOMENTS:
        words = f"{TRAIN} --resume auto"
        done, took, handled = ended(words, name, after, tmp_path)
        assert took < 10
        if not handled and not done.stderr.startswith("Stopped"):
            # Python itself was starting: its own end by a signal, or its own traceback.
            assert done.returncode in (-getattr(signal, name), 1, 130)
            assert "start.py" not in done.stderr
            continue
        assert (after, done.returncode) == (after, expected), done.stderr
        (sentence,) = done.stderr.splitlines()
        assert sentence.startswith(f"Stopped by {name}; ")
        assert sentence.endswith(("start it again.", "fastadv train --resume run"))


@pytest.mark.slow
def test_evaluate_too(tmp_path: Path) -> None:
    words = "train --method fast --limit 96 --width 2 --epochs 1 --test-limit 8 --out run"
    command = [sys.executable, "-P", "-m", "fastadv", *words.split(), "--mode", "eager"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    for after in (0.4, 1.0, 2.0, 3.0, 5.0):
        done, took, _ = ended("evaluate run --attacks pgd-2000-20", "SIGUSR1", after, tmp_path)
        assert (after, done.returncode) == (after, 75), done.stderr
        assert took < 10
        assert done.stderr.splitlines()[-1].startswith("Stopped by SIGUSR1")
        assert "Traceback" not in done.stderr
