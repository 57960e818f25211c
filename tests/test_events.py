"""TensorBoard receives the same values as metrics.jsonl, and is optional."""

from __future__ import annotations

import errno
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from fastadv.run import events
from fastadv.run.events import Events

LINE = {
    "epoch": 3,
    "loss": 1.5,
    "val_clean_percent": 90.0,
    "val_clean_interval_percent": [80.0, 95.0],
}


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

    def add_text(self, name: str, text: str, step: int) -> None:
        self._look("add_text")
        self.written.append((self.folder, name, text, step))

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
    own.begin("lr = 0.1\n")
    own.add(LINE)
    scores = {"best": {"clean": 0.75, "pgd-20": 0.5}, "last": {"clean": 0.7, "pgd-20": 0.25}}
    own.finish(scores | {"n": 20, "best_epoch": 3}, 4)
    folder = str(tmp_path)
    assert own._writer.written == [
        (folder, "settings", "```\nlr = 0.1\n```", 0),
        "flushed",
        (folder, "loss", 1.5, 3),
        (folder, "val_clean_percent", 90.0, 3),
        (folder, "val_clean_interval_percent_low", 80.0, 3),
        (folder, "val_clean_interval_percent_high", 95.0, 3),
        "flushed",
        (folder, "test/best/clean_percent", 75.0, 4),
        (folder, "test/best/pgd-20_percent", 50.0, 4),
        (folder, "test/last/clean_percent", 70.0, 4),
        (folder, "test/last/pgd-20_percent", 25.0, 4),
        "flushed",
    ]


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
    events = Events(tmp_path)
    events.begin("lr = 0.1\n")
    events.add(LINE)
    events.finish({"best": {"clean": 1.0}, "last": {"clean": 1.0}}, 4)
    assert not list(tmp_path.iterdir())


def test_tensorboard_reads_the_file(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for epoch in (1, 2):
        own = Events(tmp_path)  # a resumed run has a file of its own
        own.add(LINE | {"epoch": epoch, "loss": float(epoch)})
    read = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(read.Tags()["scalars"]) == [
        "loss",
        "val_clean_interval_percent_high",
        "val_clean_interval_percent_low",
        "val_clean_percent",
    ]
    assert {event.step for event in read.Scalars("loss")} == {1, 2}
