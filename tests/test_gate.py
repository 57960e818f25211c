"""The gate of speed (``gate.py``) is passed, and a step that is 1.4 times slower does not pass it.

It runs in a process of its own: pytest-benchmark times nothing in the processes of pytest-xdist.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.slow


def gate(folder: Path, *selected: str, slower: float = 1.0) -> subprocess.CompletedProcess[str]:
    """Run the gate; what fails is tried once more: another program may have been the cause."""
    options = ["-o", "addopts=--strict-markers", "-o", f"cache_dir={folder}", "--benchmark-only"]
    options += ["-q", "-p", "no:xdist", "--benchmark-columns=min,median,rounds", *selected]
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    environment |= {"OMP_NUM_THREADS": "1", "FASTADV_GATE_SLOWER": str(slower)}
    command = [sys.executable, "-P", "-m", "pytest", *options, str(HERE / "gate.py")]
    tries = ((), ("--last-failed",)) if slower == 1 else ((),)  # noise must not excuse a slow step
    for more in tries:
        done = subprocess.run(
            [*command, *more], cwd=HERE.parent, env=environment, capture_output=True, text=True
        )
        print(done.stdout, done.stderr)
        if done.returncode == 0:
            break
    return done


def test_kernels_and_step_are_as_fast_as_they_were(tmp_path: Path) -> None:
    assert gate(tmp_path).returncode == 0


def test_a_step_that_is_slower_does_not_pass(tmp_path: Path) -> None:
    done = gate(tmp_path, "-k", "pgd_step", slower=1.4)
    assert done.returncode == 1
    assert "times plain PyTorch, at most" in done.stdout
