"""Signals and the end of the time ask to stop; where nothing would be lost they end at once."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fastadv.cli.max_time import seconds_of
from fastadv.engine.process import stop
from fastadv.errors import UserError
from fastadv.exit_codes import after_stop


@pytest.fixture(autouse=True)
def not_under_nohup() -> Iterator[None]:
    """A signal that is ignored when a program begins stays so (``nohup pytest``)."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU", "SIGINT")


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@contextmanager
def handlers_kept() -> Iterator[None]:
    numbers = [getattr(signal, name) for name in (*SIGNALS, "SIGALRM")]
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        assert [signal.getsignal(number) for number in numbers] == before
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.parametrize("name", SIGNALS)
def test_it_stops_at_once_where_nothing_is_held(name: str) -> None:
    with (
        handlers_kept(),
        pytest.raises(stop.Stopped, match=name) as stopped,
        stop.handled(),
    ):
        send(name)
    assert stopped.value.by == name
    assert after_stop(name) == (130 if name == "SIGINT" else 75)


@pytest.mark.parametrize("name", SIGNALS)
def test_what_is_held_is_asked_and_a_second_signal_ends_it(name: str) -> None:
    with handlers_kept(), stop.handled(), stop.held():
        assert stop.asked() is None
        send(name)
        assert stop.asked() == name
        assert not stop.insists()
        with pytest.raises(stop.Stopped, match=name):
            send("SIGINT")
        assert stop.insists()
    with stop.handled():
        assert stop.asked() is None


def test_a_second_sigterm_soon_after_the_first_is_ignored() -> None:
    """torchrun forwards a signal that its workers have already received."""
    with stop.handled(), stop.held():
        send("SIGTERM")
        send("SIGTERM")
        assert not stop.insists()


def test_under_torchrun_ctrl_c_comes_twice_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    with stop.handled(), stop.held():
        send("SIGINT")
        send("SIGINT")
        assert not stop.insists()


def test_what_the_parent_has_ignored_stays_so() -> None:
    """nohup ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop.handled():
            send("SIGHUP")
            assert stop.asked() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_long_pass_is_interrupted_after_the_grace() -> None:
    with handlers_kept(), stop.handled(), stop.held():
        send("SIGTERM")
        began = time.monotonic()
        with pytest.raises(stop.Stopped), stop.interruptible(0.2):
            time.sleep(5)
        assert 0.1 < time.monotonic() - began < 2
        time.sleep(0.01)  # a save after it is not interrupted


def test_what_is_held_is_not_interrupted() -> None:
    with stop.handled(), stop.held():
        with stop.interruptible(0.05):
            send("SIGTERM")
        time.sleep(0.2)
        assert stop.asked() == "SIGTERM"


def test_an_import_is_left_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "slowly_imported.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.2)\n"
        "whole = True\n"
    )
    (tmp_path / "begun.py").write_text("import slowly_imported, time\ntime.sleep(5)\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(stop.Stopped), stop.handled():
            runpy.run_path(str(tmp_path / "begun.py"))
        assert sys.modules["slowly_imported"].whole
    finally:
        sys.modules.pop("slowly_imported", None)


def test_a_time_that_ends_within_the_imports_is_a_mistake(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The import is not left by an exception but by the end of the process, with the same words."""
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(stop, "_imports", lambda frame: True)
    with handlers_kept(), stop.handled(command=True):
        stop.allow(1e-3)
        began = time.monotonic()
        while not codes and time.monotonic() - began < 5:
            time.sleep(0.01)
    assert codes[:1] == [2]
    assert "the start alone takes as long" in capfd.readouterr().err


def test_the_allowed_time_is_measured_from_the_start_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert time.time() - stop.started() > 0.5  # this process has imported much
    monkeypatch.setattr(stop, "started", lambda: time.time() - 100)
    with handlers_kept(), stop.handled(), stop.held():
        began = time.monotonic()
        stop.allow(100.6)  # less a tenth, it is over
        while stop.asked() is None and time.monotonic() - began < 5:
            time.sleep(0.01)
        assert stop.asked() == "--max-time"
        assert time.monotonic() - began < 0.3
    assert after_stop("--max-time") == 75


def test_a_long_save_is_part_of_the_allowed_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "started", time.time)
    with handlers_kept(), stop.handled(), stop.held():
        stop.allow(36000)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert left == pytest.approx(36000 - 30, abs=2)
        stop.saved_in(20)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert left == pytest.approx(36000 - 30 - 60, abs=2)


def test_nothing_of_a_command_is_left_for_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stop, "started", time.time)
    with stop.handled(command=True), stop.held():
        stop.allow(100)
        stop.saved_in(20)
        send("SIGTERM")
        stop.ending()  # and never begins to hold again
    with stop.held(), handlers_kept(), stop.handled():
        stop.allow(36000)
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert left == pytest.approx(36000 - 30, abs=2)
        with pytest.raises(stop.Stopped):
            send("SIGTERM")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("23:30:00", 84600),
        ("1-12:00:00", 129600),
        ("90m", 5400),
        ("1.5h", 5400),
        ("45s", 45),
        ("2d", 172800),
        (" 90M ", 5400),
    ],
)
def test_times(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "90", "23:30", "1:99:00", "-1h", "0m", "soon", "nan", "1e9h", "9" * 400 + "h"]
)
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"such as 23:30:00"):
        seconds_of(text)
