"""Generated command lines and configuration files: one sentence and a documented exit code, no
traceback, no hang, no changed file. A line that is right reaches a stub of the training."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
import typer
from generated_lines import Lines, make_places

from fastadv.cli import main as command_line
from fastadv.errors import UserError
from fastadv.exit_codes import ExitCode
from fastadv.run.resolve import resolve_run
from fastadv.run.source import open_source

SECONDS = 20  # for one line; most take milliseconds


class Folder:
    """A folder in which command lines are called, and what it holds."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.drawn = Lines(seed, make_places(path))
        self.trained = 0

    def state(self) -> list[tuple[str, int, int, int]]:
        found = []
        for place in sorted(self.path.rglob("*")):
            about = os.lstat(place)
            found.append((str(place), about.st_mode, about.st_size, about.st_mtime_ns))
        return found


@pytest.fixture
def folder(tmp_path, monkeypatch):
    path = tmp_path / "work"
    path.mkdir()
    made = Folder(path, seed=0)
    monkeypatch.chdir(path)
    home = tmp_path / "home"
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_STATE_HOME"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.delenv("COLUMNS", raising=False)  # a sentence is then one line
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of a plugin that is tried

    def stub(request, *others):
        config = resolve_run(request)
        if ":" in config.data:  # none of the places holds data
            open_source(config, torch.device("cpu"))
        made.trained += 1

    def stub_rehearsal(config):
        raise UserError("This is a stub.")

    # With --resume auto, and without. In this order: ``onward`` would import the stub and keep it.
    for place in ("onward", "train"):
        monkeypatch.setattr(f"fastadv.run.{place}.train", stub)
    monkeypatch.setattr("fastadv.cli.dry_run.rehearse", stub_rehearsal)
    application = command_line.application

    @functools.cache
    def built(command):
        return typer.main.get_command(application(command))

    monkeypatch.setattr(command_line, "application", built)
    yield made
    os.chmod(path / "locked", 0o755)
    assert not home.exists()


class Hang(BaseException):
    """A line took longer than ``SECONDS``."""


def _hang(*_):
    raise Hang


def call(words, capsys, monkeypatch) -> tuple[object, str, str]:
    monkeypatch.setattr(sys, "argv", ["fastadv", *words])
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(SECONDS)
    code: object = "it returned"
    try:
        with warnings.catch_warnings():
            command_line.main()
    except SystemExit as done:
        code = done.code or 0
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def complaint(code: object, out: str, err: str) -> str | None:
    """What is wrong with an outcome."""
    if code not in set(ExitCode) - {ExitCode.WRONG}:
        return f"exit code {code!r}"
    if "Traceback" in out + err:
        return "a traceback"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f\u202e]", out + err):
        return "control characters"
    said = [line for line in err.splitlines() if not line.startswith("warning: ")]
    if code == 2 and (len(said) != 1 or not said[0].startswith("error: ")):
        return "no single sentence"
    if code == 2 and len(said[0]) > 1_500:
        return "a sentence of a page"
    for foreign in ("pydantic", "unable to parse", "Input should", "NoneType", "object has no"):
        if foreign in err:
            return f"words of a library: {foreign}"
    return None


def run_lines(count, folder, capsys, monkeypatch) -> None:
    """Raise ``AssertionError`` with all lines that end in something else than they should."""
    wrong = []
    before = folder.state()
    for number in range(count):
        words = folder.drawn.line()
        if number % 4 == 0:
            content = folder.drawn.configuration()
            (folder.path / "drawn.toml").write_bytes(content)
            before = folder.state()
            words = [word for word in words[:3] if word != "-h"]
            words = ["train", "--config", "drawn.toml", *words[1:]]
        outcome = call(words, capsys, monkeypatch)
        found = complaint(*outcome)
        after = folder.state()
        if after != before:
            changed = {entry[0] for entry in set(before) ^ set(after)}
            found, before = f"changed files: {sorted(changed)}", after
        if found is not None:
            file = (folder.path / "drawn.toml").read_bytes()[:400] if number % 4 == 0 else b""
            shown = [word[:80] for word in words]
            wrong.append(f"{found}: {shown} {file!r}\n    {outcome[2][-600:]}")
    assert not wrong, f"{len(wrong)} of {count}\n" + "\n".join(wrong)
    assert folder.trained > count // 100  # some lines are right


def test_forty_lines(folder, capsys, monkeypatch):
    run_lines(40, folder, capsys, monkeypatch)


@pytest.mark.slow
def test_four_hundred_lines(folder, capsys, monkeypatch):
    folder.drawn = Lines(1, folder.drawn.places)
    run_lines(400, folder, capsys, monkeypatch)


@pytest.mark.long
def test_twenty_five_hundred_lines(folder, capsys, monkeypatch):
    folder.drawn = Lines(int(os.environ.get("GENERATED_SEED", "2")), folder.drawn.places)
    run_lines(2_500, folder, capsys, monkeypatch)
