"""Generated folders of images: data or one sentence; no traceback, no hang, no changed file."""

from __future__ import annotations

import importlib.util
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from odd_folders import odd_folder, snapshot

from fastadv.errors import UserError
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.source import open_source

SECONDS = 20
DALI = importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None


def opened(folder: Path, seed: int) -> str:
    """What a run on the folder's images begins with: "data", or the sentence that refuses it."""
    rng = random.Random(seed)
    asked = RunRequest(
        method="fast",
        data=f"folder:{folder}",
        batch_size=2,
        pad=0,
        image_size=rng.choice((None, 8)),
        skip_broken=rng.random() < 0.6,
        loader=rng.choice(("device", "device", "dali")) if DALI else "device",
        val_fraction=0.3,
    )
    try:
        source = open_source(resolve_run(asked), torch.device("cpu"))
        for batch in source.loader.epoch(0):
            assert batch.image.isfinite().all()
        for x, _ in source.test:
            assert x.isfinite().all()
    except UserError as error:
        return str(error)
    return "data"


def check(home: Path, seeds: range) -> None:
    def too_long(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    outcomes = {"data": 0, "sentence": 0}
    try:
        for seed in seeds:
            folder = home / f"{seed}"
            names = odd_folder(folder, seed)
            found = snapshot(folder)
            signal.alarm(SECONDS)
            try:
                said = opened(folder, seed)
            except BaseException as error:
                raise AssertionError(f"{seed}, {names}: {error!r}") from error
            finally:
                signal.alarm(0)
            assert said.isprintable(), (seed, names, said)
            assert snapshot(folder) == found, (seed, names)
            outcomes["data" if said == "data" else "sentence"] += 1
            shutil.rmtree(folder)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert min(outcomes.values()) > len(seeds) // 10, outcomes


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_some_folders(tmp_path: Path) -> None:
    check(tmp_path, range(25))


@pytest.mark.slow
def test_many_folders(tmp_path: Path) -> None:
    check(tmp_path, range(100, 300))


@pytest.mark.long
def test_two_thousand_folders(tmp_path: Path) -> None:
    check(tmp_path, range(1000, 3000))
