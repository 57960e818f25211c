"""A run that diverges keeps its last good weights, names its suspects and says how to go on."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from two_processes import in_two_processes

from fastadv.algorithms.contract import Part
from fastadv.algorithms.contract.part import option_names
from fastadv.algorithms.parts import PARTS
from fastadv.errors import TrainingError
from fastadv.run.request import RunRequest
from fastadv.run.schedules import Schedule
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint
from fastadv.storage.trust import trusting

SETTINGS: dict[str, Any] = {
    "method": "trades",
    "model": "small_net:SmallNet",
    "epochs": 2,
    "batch_size": 32,
    "limit": 200,
    "lr": 0.05,
    "schedule": "constant",
    "mode": "eager",
    "select_attack": "pgd-1",
    "test_attacks": "clean",
    "test_limit": 20,
    "options": {"steps": 1},
}


def last_good(out: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = checkpoint.load(out / "last_good.pt")["model"]
    assert all(tensor.isfinite().all() for tensor in found.values())
    return found


def test_the_suspects_and_the_way_out_are_named(tmp_path: Path) -> None:
    out = tmp_path / "my run"
    said = r"at step \d+; .*saved in .*last_good\.pt\. The usual suspects of this run: "
    said += r"--lr 1e\+30, --beta 6\. To go on more slowly: fastadv train --config '.*config\.toml'"
    said += r" --init '.*last_good\.pt' --lr 3\.3e\+29 --out '.*my run-slower'$"
    with pytest.raises(TrainingError, match=said):
        train(RunRequest(**SETTINGS | {"lr": 1e30}, out=str(out)))
    last_good(out)


def test_fp16_is_a_suspect(tmp_path: Path) -> None:
    asked = SETTINGS | {"method": "fast", "lr": 1e30, "amp": True, "amp_dtype": "fp16"}
    asked["options"] = {}
    with pytest.raises(TrainingError, match=r"--lr 1e\+30, --amp-dtype fp16"):
        train(RunRequest(**asked, out=str(tmp_path / "run")))


def test_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"

    train(RunRequest(**SETTINGS, out=str(out)))
    good = checkpoint.load(out / "last.pt")
    config = out / "config.toml"
    kept = config.read_text().replace("epochs = 2", "epochs = 3").splitlines(keepends=True)
    config.write_text("".join(line for line in kept if not line.startswith("# checksum")))
    rated = Schedule.__call__

    def exploding(self: Schedule, update: int) -> None:
        rated(self, update)
        for group in self.optimizer.param_groups:
            group["lr"] = 1e30

    monkeypatch.setattr(Schedule, "__call__", exploding)
    with trusting(True), pytest.raises(TrainingError, match=r"at step \d+; .*last_good\.pt"):
        resume(str(out))
    assert last_good(out).keys() == good["model"].keys()


def test_statistics_that_overflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """BatchNorm's running variance overflows though the loss is finite."""
    import small_net

    made = small_net.SmallNet.__init__

    def large(self: small_net.SmallNet, num_classes: int, in_channels: int) -> None:
        made(self, num_classes, in_channels)
        with torch.no_grad():
            self.layers[0].weight.mul_(1e20)

    monkeypatch.setattr(small_net.SmallNet, "__init__", large)
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"at step 0; .*last_good\.pt"):
        train(RunRequest(**SETTINGS, out=str(out)))
    last_good(out)


def test_every_suspect_is_an_option_of_its_part() -> None:
    parts: list[type[Part]] = [part for slot in PARTS.values() for part in slot.values()]
    named = [part for part in parts if part.suspects]
    assert named
    for part in named:
        assert set(part.suspects) <= set(option_names(part))


def _in_a_process(rank: int, port: int, out: str) -> None:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with pytest.raises(TrainingError, match=r"at step .*usual suspects"):
        train(RunRequest(**SETTINGS | {"lr": 1e30}, device="cpu", out=out))


@pytest.mark.slow
def test_with_two_processes(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_two_processes(_in_a_process, port, str(tmp_path / "run"))
    last_good(tmp_path / "run")
