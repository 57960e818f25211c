"""The epoch loop: what its lines say, and in which precision it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastadv.config import TrainConfig
from fastadv.console import Console
from fastadv.train import resume, train

SMALL = {
    "method": "fast",
    "width": 2,
    "epochs": 2,
    "limit": 96,
    "batch_size": 32,
    "test_limit": 32,
    "lr": 0.0,
    "weight_decay": 0.0,
    "schedule": "constant",
    "mode": "eager",
    "flip": False,
    "pad": 0,
    "select_attack": "fgsm",
    "test_attacks": "clean",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs that change no weight."""
    out = tmp_path_factory.mktemp("runs") / "small"
    train(TrainConfig(**SMALL, out=str(out)), Console())
    return out


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_of_an_epoch_is_its_own_mean(run: Path) -> None:
    """With weights that stand still both epochs lose about the same, and about log 10."""
    first, second = (line["loss"] for line in lines(run))
    assert 1.5 < first < 5
    assert second == pytest.approx(first, rel=0.2)


def test_lines_of_epochs_that_were_not_saved_are_forgotten(run: Path) -> None:
    """A crash between an epoch's line and its checkpoint must not leave the line twice."""
    with open(run / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"epoch": 3, "loss": 0.0}) + "\n")
    resume(str(run), Console())
    assert [line["epoch"] for line in lines(run)] == [1, 2]


@pytest.mark.parametrize("allowed", [True, False])
def test_every_training_pass_is_in_the_runs_tf32(
    allowed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[tuple[bool, bool]] = set()
    forward = torch.nn.Conv2d.forward

    def noting(module: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        if module.training:
            seen.add((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return forward(module, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noting)
    train(TrainConfig(**SMALL | {"epochs": 1}, tf32=allowed, out=str(tmp_path / "run")), Console())
    assert seen == {(allowed, allowed)}
