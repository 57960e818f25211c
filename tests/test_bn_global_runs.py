"""Whole runs with ``--bn global``: the same with any number of processes, also if it changes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from divided import distance, in_processes

from fastadv.errors import Interrupted
from fastadv.run.console import Console
from fastadv.run.epoch_loop import EpochLoop
from fastadv.run.request import RunRequest
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint

pytestmark = pytest.mark.slow

# 51 images: three batches of 16, and three images for four processes.
SETTINGS: dict[str, Any] = {
    "model": "wide_net:wide_net", "bn": "global", "epochs": 3, "limit": 51, "batch_size": 16,
    "select": "test", "test_limit": 20, "eval_every": 10, "select_attack": "fgsm",
    "test_attacks": "clean,fgsm", "mode": "eager", "device": "cpu",
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "atta-1": {},
    "free": {"options": {"replays": 2}},
    "swa": {"options": {"steps": 2, "average_start": 1}},
    "pgd-consistency": {"options": {"steps": 2}},
    "fast": {"augmentation": "rotate+mixup+cutmix"},
}
STOPS = [(0, 2), (1, 2), (2, 1)]  # epoch and batch at which the processes stop
PROCESSES = [1, 2, 4, 1]


def part(rank: int, world: int, at: int, folder: str, place: int) -> None:
    """The part of each run up to stop number ``place`` (-1: to its end), in one process of
    ``world``."""
    torch.set_num_threads(1)
    os.environ |= {
        "WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(at),
    }  # fmt: skip
    until = dict(enumerate(STOPS)).get(place)

    def stops(self: EpochLoop) -> bool:
        return (self.progress.epoch, self.progress.batch) == until

    EpochLoop._asked_to_stop = stops  # type: ignore[method-assign]
    for number, method in enumerate(METHODS):
        os.environ["MASTER_PORT"] = str(at + number)
        out = f"{folder}/{method}"
        try:
            if place > 0:
                resume(out, Console())
            else:
                train(RunRequest(method=method, out=out, **SETTINGS | METHODS[method]), Console())
        except Interrupted:
            assert until is not None


def lines(folder: str, method: str) -> list[dict[str, Any]]:
    text = Path(folder, method, "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """The folders of runs of one process, and of those of a changing number."""
    whole, changing = (str(tmp_path_factory.mktemp(name)) for name in ("whole", "changing"))
    in_processes(part, 1, whole, -1)
    for place, world in enumerate(PROCESSES):
        in_processes(part, world, changing, place)
    return whole, changing


@pytest.mark.parametrize("method", METHODS)
def test_a_run_does_not_depend_on_its_processes(method: str, runs: tuple[str, str]) -> None:
    one, other = (checkpoint.load(Path(folder, method, "last.pt")) for folder in runs)
    assert distance(other["model"], one["model"]) < 1e-8
    first, second = (lines(folder, method) for folder in runs)
    assert [line["epoch"] for line in first] == [line["epoch"] for line in second] == [1, 2, 3]
    for before, after in zip(first, second, strict=True):
        for name in ("loss", "train_accuracy_percent", "grad_norm"):
            assert after[name] == pytest.approx(before[name], rel=1e-5), name
