"""The command with which a sentence says how a run goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastadv.run.way_on import continued, interrupted, resume_command, train_command

LAUNCHED = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in LAUNCHED.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def test_one_process() -> None:
    assert resume_command("runs/apart") == "fastadv train --resume runs/apart"
    assert resume_command(Path("a run")) == "fastadv train --resume 'a run'"
    assert continued(Path("run")) == "continue with: fastadv train --resume run"
    assert train_command("--lr", "0.1") == "fastadv train --lr 0.1"


def test_names_move_no_cursor() -> None:
    assert resume_command("a\x1b[2Jb\nc") == r"fastadv train --resume 'a\x1b[2Jb\nc'"


def test_a_long_path_is_whole() -> None:
    assert resume_command("a" * 1000) == f"fastadv train --resume {'a' * 1000}"


def test_plugins_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv.run.way_on.loaded_files", lambda: [Path("my part.py")])
    assert train_command("--lr", "1") == "fastadv train --plugin 'my part.py' --lr 1"


def test_under_torchrun(launched: pytest.MonkeyPatch) -> None:
    command = "fastadv-torchrun --nproc-per-node 8 -m fastadv train --resume run"
    assert resume_command("run") == command
    assert str(interrupted(Path("run"), "SIGTERM")) == (
        f"Stopped by SIGTERM; continue with: {command}"
    )
    launched.setenv("WORLD_SIZE", "1")
    assert resume_command("run") == "fastadv train --resume run"


def test_on_several_machines(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("WORLD_SIZE", "16")
    launched.setenv("GROUP_WORLD_SIZE", "2")
    assert resume_command("run") == (
        "fastadv-torchrun --nnodes 2 --nproc-per-node 8 -m fastadv train --resume run "
        "(on each machine, with its rendezvous options)"
    )
