"""Runs the ``interpreted_*.py`` files beside this one in Triton's interpreter.

Triton decides at decoration time whether a kernel is interpreted, so they need a process that
starts with ``TRITON_INTERPRET=1``; these tests are what the ordinary session sees of them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastadv.kernels import dispatch

if not dispatch.TRITON_INSTALLED:
    pytest.skip("Triton is not installed", allow_module_level=True)

FILES = sorted(Path(__file__).parent.glob("interpreted_*.py"))


def run_interpreted(files: list[Path], selection: str) -> None:
    # Its own options: the project's may ask for plugins and workers of the outer session.
    options = ["-o", "addopts=--strict-markers", "-q", "-m", selection, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *map(str, files)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    print(done.stdout, done.stderr)
    nothing_selected = 5
    assert done.returncode == 0 or (selection == "slow" and done.returncode == nothing_selected)


def test_in_the_interpreter() -> None:
    run_interpreted(FILES, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_sweep_in_the_interpreter(file: Path) -> None:
    run_interpreted([file], "slow")


def test_there_are_files_to_run() -> None:
    assert len(FILES) >= 5
