"""TensorBoard receives the same values as metrics.jsonl, and is optional."""

from __future__ import annotations

import importlib.util
import sys
import types

from fastadv.run.events import Events

LINE = {"epoch": 3, "loss": 1.5, "val_clean": 0.9}


def test_every_number_becomes_a_scalar_of_its_epoch(tmp_path, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, step):
            written.append((self.folder, name, value, step))

        def flush(self):
            written.append("flushed")

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    Events(tmp_path).add(LINE)
    folder = str(tmp_path)
    assert written == [(folder, "loss", 1.5, 3), (folder, "val_clean", 0.9, 3), "flushed"]


def test_without_tensorboard_nothing_happens(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    Events(tmp_path).add(LINE)
    assert not list(tmp_path.iterdir())
