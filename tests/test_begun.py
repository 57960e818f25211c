"""What a run that goes on reads, and when it has ended."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from test_begun_with import SMALL, stopped

from fastadv.run.console import Console
from fastadv.run.ended import ended, has_ended
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the checkpoints that were read."""
    names: list[str] = []
    load = checkpoint.load

    def noted(path: Path) -> dict[str, Any]:
        names.append(path.name)
        return load(path)

    monkeypatch.setattr(checkpoint, "load", noted)
    return names


def test_the_last_checkpoint_is_read_once(tmp_path: Path, reads: list[str]) -> None:
    out = stopped(tmp_path / "run")
    weights = tmp_path / "begin"
    train(RunRequest(**SMALL | {"epochs": 1}, out=str(weights)), Console())
    begun = stopped(tmp_path / "from", init=str(weights), guard_overfitting="back")
    for folder in (out, begun):
        reads.clear()
        resume(str(folder), Console())
        assert reads.count("last.pt") == 1


def test_a_damaged_one_and_the_one_before_are_read_once(tmp_path: Path, reads: list[str]) -> None:
    out = tmp_path / "run"
    train(RunRequest(**SMALL, out=str(out)), Console())
    (out / "last.pt").write_bytes(b"no checkpoint")
    (out / "summary.json").unlink()
    reads.clear()
    resume(str(out), Console())
    assert reads.count("last.pt") + reads.count("previous.pt") == 2


def test_a_run_has_ended_after_its_epochs(tmp_path: Path) -> None:
    out = stopped(tmp_path / "run")
    folder = RunFolder(out)
    config = folder.read_config()
    assert ended(folder, config) is None
    assert not has_ended(folder, config)
    summary = resume(str(out), Console())
    assert summary["epochs"] == 2
    assert ended(folder, config) == ended(folder, config, 2) == folder.read_summary()
    assert ended(folder, config, 1) is None  # the checkpoint of its end is lost
    longer = dataclasses.replace(config, epochs=3)
    assert ended(folder, longer) is None
    assert not has_ended(folder, longer)
    folder.summary.write_text("{}")
    assert has_ended(folder, config)  # it was written, whatever it said
