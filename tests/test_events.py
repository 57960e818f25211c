"""TensorBoard receives the same values as metrics.jsonl, and is optional."""

from __future__ import annotations

import importlib.util
import sys
import types

from fastadv.run.events import Events

LINE = {
    "epoch": 3,
    "loss": 1.5,
    "val_clean_percent": 90.0,
    "val_clean_interval_percent": [80.0, 95.0],
}


def test_every_number_becomes_a_scalar_of_its_epoch(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, value, step))

        def add_text(self, name, text, step):
            written.append((self.folder, name, text, step))

        def flush(self):
            written.append("flushed")

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    events = Events(tmp_path)
    events.begin("lr = 0.1\n")
    events.add(LINE)
    scores = {"best": {"clean": 0.75, "pgd-20": 0.5}, "last": {"clean": 0.7, "pgd-20": 0.25}}
    events.finish(scores | {"n": 20, "best_epoch": 3}, 4)
    folder = str(tmp_path)
    assert written == [
        (folder, "settings", "```\nlr = 0.1\n```", 0),
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


def test_without_tensorboard_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    events = Events(tmp_path)
    events.begin("lr = 0.1\n")
    events.add(LINE)
    events.finish({"best": {"clean": 1.0}, "last": {"clean": 1.0}}, 4)
    assert not list(tmp_path.iterdir())
