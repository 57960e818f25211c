"""Runs that end in the middle, damage to their files, and a comparison of two runs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadv.run import own_scores
from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.train import train
from fastadv.storage import checkpoint

SETTINGS: dict[str, Any] = {
    "method": "fast", "width": 2, "epochs": 4, "limit": 96, "batch_size": 32, "mode": "eager",
    "select_attack": "fgsm", "test_attacks": "clean,fgsm", "test_limit": 40, "lr": 0.5,
    "options": {"averaging": "ema"},
}  # fmt: skip


class PowerCut(Exception):
    """Ends a run at once, as SIGKILL does."""


def cut_after(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run ends when the checkpoint after ``epoch`` has been written."""
    save = RunFolder.save_last

    def save_then_end(self: RunFolder, payload: dict[str, Any], **options: Any) -> None:
        save(self, payload, **options)
        if payload["progress"]["epoch"] == epoch and not payload["progress"]["batch"]:
            raise PowerCut

    monkeypatch.setattr(RunFolder, "save_last", save_then_end)


def begun(out: Path, monkeypatch: pytest.MonkeyPatch, epoch: int = 3, **settings: Any) -> Path:
    """A run of ``SETTINGS`` that ended after ``epoch``."""
    with monkeypatch.context() as patch:
        cut_after(epoch, patch)
        with pytest.raises(PowerCut):
            train(RunRequest(**SETTINGS | settings, out=str(out)), Console())
    return out


def require_same(out: Path, whole: Path) -> None:
    """All weights, states and numbers of two runs but the times are equal."""

    def compare(name: str, one: Any, two: Any) -> None:
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two), name
        elif isinstance(one, dict):
            assert one.keys() == two.keys(), name
            for key in one:
                compare(f"{name} {key}", one[key], two[key])
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(two), name
            for place, pair in enumerate(zip(one, two, strict=True)):
                compare(f"{name} {place}", *pair)
        elif not name.endswith(("second", "seconds", "memory_mb", "checksum", "configuration")):
            assert one == two, name

    for file in ("last.pt", "best.pt", "averaged.pt"):
        compare(file, checkpoint.load(out / file), checkpoint.load(whole / file))
    for file in ("summary.json", "metrics.jsonl"):
        found, expected = (
            [json.loads(line) for line in text.splitlines()]
            if file.endswith("jsonl")
            else json.loads(text)
            for text in ((out / file).read_text(), (whole / file).read_text())
        )
        compare(file, found, expected)


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed, without the ends of its lines."""
    return " ".join(capsys.readouterr().out.split())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.unlink()  # previous.pt may be another name of it
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {"cut": truncate, "flip": flip, "gone": Path.unlink}
WAYS = ["cut", *(pytest.param(way, marks=pytest.mark.slow) for way in ("flip", "gone"))]


def progress(path: Path) -> dict[str, Any]:
    return dict(checkpoint.load(path)["progress"])


def best_is(epoch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of ``epoch`` (from 1) are the best."""
    keep = own_scores.OwnScores._keep_best

    def scored(self: Any, scores: dict[str, float]) -> None:
        found = dict(scores) | {"fgsm": float(self.progress.epoch + 1 == epoch)}
        keep(self, found)

    monkeypatch.setattr(own_scores.OwnScores, "_keep_best", scored)
