"""``fastadv evaluate`` and ``compare`` in two processes, as torchrun starts them: one result, and
one exit code."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadv.run.console import Console
from fastadv.run.request import RunRequest
from fastadv.run.train import train
from fastadv.storage import checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    settings: dict[str, Any] = {"method": "standard", "width": 2, "epochs": 3, "mode": "eager"}
    train(RunRequest(**settings, out=str(out), eval_every=100), Console())
    return out


def both(*words: object) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "fastadv", *map(str, words)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300) for process in started]
    return [(one.returncode, *said) for one, said in zip(started, told, strict=True)]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]


def test_they_share_the_images_and_one_shows_and_stores(run: Path) -> None:
    first, second = both("evaluate", run, "--attacks", "clean,pgd-2", "--limit", 50)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert first[1].count("pgd-2") == 1
    assert second[1:] == ("", "")
    assert [(line["attack"], line["n"]) for line in lines(run)] == [("clean", 50), ("pgd-2", 50)]


def test_a_comparison_is_shown_by_one(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(run, other)
    saved = checkpoint.load(run / "best.pt")
    for tensor in saved["model"].values():
        if tensor.is_floating_point():
            tensor *= 1.01
    checkpoint.save(other / "best.pt", saved)
    first, second = both("compare", run, other, "--attacks", "clean", "--limit", 50)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "only the first is right on" in " ".join(first[1].split())
    assert second[1:] == ("", "")


def test_a_check_that_fails_ends_all_with_3(run: Path, tmp_path: Path) -> None:
    """Of a network with logits 10,000 times as large."""
    masked = tmp_path / "masked.pt"
    weights = checkpoint.load(run / "best.pt")["model"]
    for name, tensor in weights.items():
        if tensor.shape[:1] == (10,):
            weights[name] = 1e4 * tensor
    torch.save(weights, masked)
    words = (
        "evaluate",
        "--model",
        "preact_resnet18",
        "--weights",
        masked,
        "--data",
        "digits",
        "--eps",
        0.2,
    )
    first, second = both(*words, "--sanity", "--limit", 30)
    assert (first[0], second[0]) == (3, 3), first[2] + second[2]
    assert first[1].count("FAILED  gradient") == 1
    assert second[1] == ""
    assert [line["attack"] for line in lines(Path(f"{masked}.evaluations"))] == ["sanity"]
