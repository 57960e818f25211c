"""TensorBoard receives the same values as metrics.jsonl, and is optional."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fastadv.run import events
from fastadv.run.events import Events

LINE = {"epoch": 3, "loss": 1.5, "val_clean": 0.9}


class Writer:
    """Notes what is written; ``fails`` names the method in which the disk is full."""

    fails = ""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.written: list[Any] = []
        self._look("__init__")

    def _look(self, method: str) -> None:
        if method == self.fails:
            raise OSError(errno.ENOSPC, "No space left on device")

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self._look("add_scalar")
        self.written.append((self.folder, name, value, step))

    def flush(self) -> None:
        self._look("flush")
        self.written.append("flushed")

    def close(self) -> None:
        self.written.append("closed")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "EventFile", Writer)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)


@pytest.mark.usefixtures("installed")
def test_every_number_becomes_a_scalar_of_its_epoch(tmp_path: Path) -> None:
    own = Events(tmp_path)
    own.add(LINE)
    folder = str(tmp_path)
    written = [(folder, "loss", 1.5, 3), (folder, "val_clean", 0.9, 3), "flushed"]
    assert own._writer.written == written


@pytest.mark.usefixtures("installed")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("method", ["__init__", "add_scalar", "flush"])
def test_a_full_disk_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    own = Events(tmp_path)
    if method != "__init__":
        own.add(LINE)
    monkeypatch.setattr(Writer, "fails", method)
    with pytest.warns(UserWarning, match="No space left on device"):
        own.add(LINE)
    own.add(LINE)  # a second warning would be an error
    monkeypatch.undo()
    own.add(LINE)
    if own._writer is not None:
        assert own._writer.written[-1] == "closed"


def test_without_tensorboard_nothing_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    Events(tmp_path).add(LINE)
    assert not list(tmp_path.iterdir())


def test_tensorboard_reads_the_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epoch in (1, 2):
        own = Events(tmp_path)  # a resumed run has a file of its own
        own.add(LINE | {"epoch": epoch, "loss": float(epoch)})
    read = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(read.Tags()["scalars"]) == ["loss", "val_clean"]
    assert {event.step for event in read.Scalars("loss")} == {1, 2}
