"""``fastadv train`` under torchrun: one run, shared by two processes, that stops and resumes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_resume import WORDS, same, wait_for_epoch

from fastadv.storage import checkpoint

pytestmark = pytest.mark.slow


def start(*words: str) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [*launcher, "--nproc-per-node", "2", "-m", "fastadv", "train", *words],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def finished(*words: str) -> str:
    process = start(*words)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


def stopped(out: Path, *words: str) -> Path:
    """A run in ``out`` that was asked to stop after its first epoch."""
    process = start(*words, "--out", str(out))
    wait_for_epoch(out, 1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert not (out / "summary.json").exists()
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    said = finished(*WORDS, "--out", str(out))
    assert "2 processes share each batch" in said
    assert said.count("4/4") == 1
    return out


def test_stopped_and_resumed_it_is_the_same_run(whole: Path, tmp_path: Path) -> None:
    out = stopped(tmp_path / "stopped", *WORDS)
    finished("--resume", str(out))
    same(out, whole)


def test_several_seeds_are_told_once_and_go_on(tmp_path: Path) -> None:
    words = ["--method", "fast", "--width", "2", "--epochs", "1", "--limit", "64"]
    words += ["--batch-size", "16", "--test-limit", "8", "--test-attacks", "clean"]
    words += ["--select-attack", "fgsm", "--out", str(tmp_path / "runs")]
    said = finished(*words, "--seed", "0,1")
    for once in ("seed 0 of 0, 1", "seed 1 of 0, 1", "over 2 seeds", "saved in .*/runs/summary"):
        assert len(re.findall(once, said)) == 1, once
    assert said.count("  1/1 ") == 2
    again = finished(*words, "--seed", "0,1,2")
    assert again.count("has finished") == 2
    assert again.count("  1/1 ") == 1
    assert "over 3 seeds" in again


def test_a_damaged_checkpoint_is_replaced_for_all(whole: Path, tmp_path: Path) -> None:
    out = stopped(tmp_path / "damaged", *WORDS)
    os.truncate(out / "last.pt", 1000)
    said = finished("--resume", str(out))
    assert said.count("continues from the checkpoint before") == 1
    same(out, whole)


def test_the_local_state_of_each_process_is_resumed(tmp_path: Path) -> None:
    """Free's perturbation, and the generators that draw dropout's masks."""
    words = ["--method", "free", "--replays", "2", "--dropout", "0.2", "--epochs", "3"]
    words += ["--width", "4", "--limit", "320", "--batch-size", "32", "--test-limit", "40"]
    whole = tmp_path / "whole"
    finished(*words, "--out", str(whole))
    out = stopped(tmp_path / "stopped", *words)
    finished("--resume", str(out))
    same(out, whole)
    first, second = checkpoint.load(out / "last.pt")["processes"]
    assert not torch.equal(first["rng"], second["rng"])
    assert not torch.equal(first["state"]["delta"], second["state"]["delta"])


def test_another_number_of_processes_may_continue(whole: Path, tmp_path: Path) -> None:
    """The checkpoint belongs to the whole run; one process continues with the same batches."""
    out = stopped(tmp_path / "alone", *WORDS)
    command = [sys.executable, "-m", "fastadv", "train", "--resume", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    two, one = (checkpoint.load(path / "last.pt") for path in (whole, out))
    assert one["progress"]["epoch"] == two["progress"]["epoch"]
    assert torch.equal(one["step"]["offset"], two["step"]["offset"])
    assert json.loads((out / "summary.json").read_text())["last"]["clean"] > 0.1


def test_a_batch_that_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    process = start("--batch-size", "33", "--limit", "99", "--out", str(tmp_path / "odd"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "2 processes cannot share equally" in errors.replace("\n", " ")
