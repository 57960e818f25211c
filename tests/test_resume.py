"""A run that was stopped and resumed equals an uninterrupted one bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fastadv.cli.main import application
from fastadv.errors import Interrupted, UserError
from fastadv.run.console import Console
from fastadv.run.train import resume
from fastadv.storage import checkpoint, sealed

WORDS = [
    *("--method", "apart", "--averaging", "ema", "--amp", "--width", "4", "--epochs", "4"),
    *("--limit", "480", "--batch-size", "32", "--test-limit", "40", "--eval-every", "2"),
    *("--label-noise", "0.2", "--eval-train", "40", "--keep", "best,last,previous,every-2"),
]
WRITTEN = (
    "summary.json",
    "metrics.jsonl",
    "last.pt",
    "previous.pt",
    "best.pt",
    "epochs/0002.pt",
    "epochs/0004.pt",
)


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from fastadv.cli.main import main; main()", "train", *WORDS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--out", str(out), *more],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd=out.parent,
    )


def continue_run(out: Path) -> None:
    command = [sys.executable, "-c", "from fastadv.cli.main import main; main()", "train"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--resume", str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@contextmanager
def one_thread() -> Iterator[None]:
    """As in the processes of the other runs: the number of threads changes sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def continue_here(out: Path) -> None:
    """In this process, which saves the start of another."""
    with one_thread():
        resume(str(out), Console())


def wait_for_epoch(out: Path, epoch: int) -> None:
    """Until ``epoch`` epochs are recorded and saved, and the next one is under way."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        metrics, last = out / "metrics.jsonl", out / "last.pt"
        lines = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        if lines >= epoch and last.exists():
            time.sleep(0.1)
            return
        time.sleep(0.01)
    raise AssertionError("the run did not get that far")


def same(first: Path, second: Path, files: tuple[str, ...] = ("last.pt",)) -> list[Any]:
    """Weights, optimizer, step and position of two runs, in ``files``, are equal bit for bit, and
    so are all metrics but the times, which are returned."""

    def compare(name: str, one: object, two: object) -> None:
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two), name
        elif isinstance(one, dict):
            assert one.keys() == two.keys(), name
            for key in one:
                compare(f"{name}.{key}", one[key], two[key])
        elif isinstance(one, (list, tuple)):
            assert len(one) == len(two), name
            for place, pair in enumerate(zip(one, two, strict=True)):
                compare(f"{name}.{place}", *pair)
        elif not name.endswith("seconds"):
            assert one == two, name

    for name in files:
        compare(name, checkpoint.load(first / name), checkpoint.load(second / name))
    summaries = [json.loads((path / "summary.json").read_text()) for path in (first, second)]
    for key in ("best", "last", "best_epoch"):
        assert summaries[0][key] == summaries[1][key]
    lines = [
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (first, second)
    ]
    for line in (*lines[0], *lines[1]):
        for name in ("train_seconds", "eval_seconds", "images_per_second", "checksum"):
            line.pop(name, None)
    assert lines[0] == lines[1]
    return lines[0]


def same_with_epochs(first: Path, second: Path) -> None:
    """The same of runs that keep the weights of epochs and are evaluated on training images."""
    lines = same(first, second, ("last.pt", "epochs/0002.pt", "epochs/0004.pt"))
    assert {"train_accuracy_percent", "grad_norm", "adversary/step_size"} <= lines[0].keys()
    assert {"train_clean_percent", "val_clean_percent"} <= lines[1].keys()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    with one_thread():
        application("train")(["train", *WORDS, "--out", str(out)], standalone_mode=False)
    return out


def test_killed_in_the_middle_of_an_epoch(tmp_path, uninterrupted):
    out = tmp_path / "killed"
    process = start(out)
    wait_for_epoch(out, 1)
    process.kill()
    process.communicate()
    assert not (out / "summary.json").exists()
    continue_run(out)
    same_with_epochs(out, uninterrupted)


def test_asked_to_stop_it_saves_its_place_in_the_epoch(tmp_path, uninterrupted):
    out = tmp_path / "stopped"
    process = start(out)
    wait_for_epoch(out, 1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "--resume" in errors
    continue_here(out)
    same_with_epochs(out, uninterrupted)


def test_asked_to_stop_while_evaluating(tmp_path, uninterrupted, monkeypatch):
    """The average that is being evaluated must not be saved as the live weights."""
    from fastadv.run import own_scores as module

    out = tmp_path / "evaluating"
    shutil.copytree(uninterrupted, out)
    for name in WRITTEN:
        (out / name).unlink()
    evaluate = module.run_evaluation

    def stop_then_evaluate(*words, **options):
        monkeypatch.setattr(module, "run_evaluation", evaluate)
        signal.raise_signal(signal.SIGTERM)
        return evaluate(*words, **options)

    monkeypatch.setattr(module, "run_evaluation", stop_then_evaluate)
    with pytest.raises(Interrupted):
        continue_here(out)
    continue_here(out)
    same_with_epochs(out, uninterrupted)


def test_cut_off_after_a_checkpoint_inside_an_epoch(tmp_path, uninterrupted, monkeypatch):
    """Such a checkpoint holds the position in the epoch and its metrics so far."""
    from fastadv.training.training_step import Step

    out = tmp_path / "inside"
    shutil.copytree(uninterrupted, out)
    for name in WRITTEN:
        (out / name).unlink()
    config = out / "config.toml"
    text = config.read_text().rpartition("# checksum")[0]
    config.write_text(
        sealed.seal_text(text.replace("checkpoint_minutes = 5.0", "checkpoint_minutes = 0.0"))
    )
    step = Step.__call__

    def fail_at_the_seventh(self, *inputs, **options):
        if self.calls == 6:
            raise RuntimeError("power cut")
        return step(self, *inputs, **options)

    monkeypatch.setattr(Step, "__call__", fail_at_the_seventh)
    with pytest.raises(RuntimeError, match="power cut"):
        continue_here(out)
    monkeypatch.undo()
    progress = checkpoint.load(out / "last.pt")["progress"]
    # A checkpoint as old as it may be is renewed after any batch, however long one takes.
    assert (progress["epoch"], progress["batch"]) == (0, 6)
    continue_here(out)
    same_with_epochs(out, uninterrupted)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"weights": torch.ones(3)})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        checkpoint.save(path, {"weights": torch.zeros(3)})
    monkeypatch.undo()
    assert torch.equal(checkpoint.load(path)["weights"], torch.ones(3))
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_one_changed_byte_is_detected(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"weights": torch.arange(1000.0)})
    content = bytearray(path.read_bytes())
    place = content.find(torch.arange(1000.0).numpy().tobytes()[400:408])
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load(path)


def test_a_checkpoint_of_other_code_is_not_executed(tmp_path):
    path = tmp_path / "last.pt"
    torch.save({"checksum": "", "model": Path("anything")}, path)
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(path)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        resume(str(tmp_path))
