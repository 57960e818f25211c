"""Shared by all tests: seeds, folders, the third tier's row, a fixture for the command line."""

from __future__ import annotations

import atexit
import gc
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

LONG = Path(__file__).parents[1] / "bench" / "results" / "long-tests.jsonl"


def pytest_configure() -> None:
    """One thread per worker, because there are as many workers as cores. Notes about the run
    folders of tests are stored in a temporary folder, not in the user's."""
    os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="fastadv-tests-")
    atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A shell starts jobs in the background with Ctrl-C ignored; some tests are about Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    gc.unfreeze()  # of ``_set_aside``: libraries complain of what is left at the end of Python


# Longest first. A worker runs whole files: if it began one of these last, the others would wait.
LONGEST_FILES = (
    "test_digits_recipes.py",
    "test_modes.py",
    "test_digits.py",
    "test_cuda_fake.py",
    "test_interpreter.py",
    "test_ahead_of_time.py",
    "test_bench_gpu_suite.py",
    "test_strangers.py",
    "test_processes.py",
    "test_bench_inductor.py",
    "test_examples.py",
    "test_resume.py",
    "test_attacks_autoattack.py",
    "test_modes_compilations.py",
    "test_modes_inductor.py",
    "test_transaction.py",
    "test_precision.py",
    "test_models.py",
    "test_bench.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files begin first."""
    place = {name: number for number, name in enumerate(LONGEST_FILES)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


_in_hand: list[Path] = []  # the file whose tests run


def _set_aside(file: Path) -> None:
    """Before the first test of a ``file``: what earlier ones left is freed, and what is left then,
    such as the modules of torch, is not looked at by the garbage collector any more. In a worker
    that has run many files a collection would take seconds, and torch's compiler causes many."""
    if _in_hand != [file]:
        _in_hand[:] = [file]
        gc.collect()
        gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Seed before a test's first fixture, so that its draws do not depend on earlier tests."""
    import torch  # imported late: it reads OMP_NUM_THREADS on import

    _set_aside(item.path)
    torch.manual_seed(0)
    random.seed(0)
    numpy.random.seed(0)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """CI does not run the third tier, so each run of it writes a row."""
    if config.option.markexpr != "long":
        return
    import torch

    from fastadv.benchmark.rows import append_rows, provenance

    found = {
        word: sorted(report.nodeid for report in terminalreporter.stats.get(word, ()))
        for word in ("passed", "failed", "error", "skipped")
    }
    figures = {
        report.nodeid: dict(report.user_properties)
        for report in terminalreporter.stats.get("passed", ())
        if report.user_properties  # of ``record_property``
    }
    row = provenance(torch.device("cpu")) | {"kind": "long tests"} | found
    row |= {"figures": figures} if figures else {}
    append_rows(LONG, [row])


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without COLUMNS, which Python's readline sets where a worker imports it, a sentence that is
    not on a terminal is one line. Typer sets a hook for errors in every command."""
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)


class Outcome:
    """The result of a command: exit code, standard output and standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def fastadv_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Outcome]:
    """``fastadv_command("train", "--epochs", 1)`` in an empty folder."""
    from fastadv.cli.main import main

    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fastadv", *map(str, words)])
        with pytest.raises(SystemExit) as exit_code:
            main()
        captured = capsys.readouterr()
        return Outcome(int(exit_code.value.code or 0), captured.out, captured.err)

    return run
