"""Runs ``on_pretend_gpu*.py``: every recipe on a device that behaves as CUDA does towards Python.

The device is registered for the whole process, so the tests on it have one of their own; these
are what the ordinary session sees of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
FILES = sorted(str(path) for path in HERE.glob("on_pretend_gpu*.py"))


def run_pretending(selection: str) -> None:
    # Its own options: the project's may ask for plugins and workers of the outer session.
    options = ["-o", "addopts=--strict-markers", "-q", "-m", selection, "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", *options, *FILES],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0


def test_on_a_pretended_gpu() -> None:
    run_pretending("not slow")


@pytest.mark.slow
def test_every_recipe_on_a_pretended_gpu() -> None:
    run_pretending("slow")
