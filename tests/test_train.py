"""The epoch loop: the values of its lines, and its precision."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from edited import edit
from safetensors import safe_open

from fastadv.engine.process.device import choose_device
from fastadv.errors import Interrupted, UserError
from fastadv.run.console import Console
from fastadv.run.epoch_loop import EpochLoop
from fastadv.run.export import export_run
from fastadv.run.finished import evaluate_run
from fastadv.run.own_scores import OwnScores
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder, _free_name
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint

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
    train(RunRequest(**SMALL, out=str(out)), Console())
    return out


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_of_an_epoch_is_its_own_mean(run: Path) -> None:
    """With constant weights both epochs have about the same loss, close to log 10."""
    first, second = (line["loss"] for line in lines(run))
    assert 1.5 < first < 5
    assert second == pytest.approx(first, rel=0.2)


def test_lines_of_epochs_that_were_not_saved_are_deleted(run: Path) -> None:
    """A crash between an epoch's line and its checkpoint must not leave the line twice."""
    RunFolder(run).add_metrics({"epoch": 3, "loss": 0.0})
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
    train(RunRequest(**SMALL | {"epochs": 1}, tf32=allowed, out=str(tmp_path / "run")), Console())
    assert seen == {(allowed, allowed)}


AVERAGED = {
    "method": "fast",
    "width": 2,
    "epochs": 3,
    "limit": 96,
    "batch_size": 32,
    "mode": "eager",
}
AVERAGED |= {"test_limit": 60, "select_attack": "fgsm", "test_attacks": "clean,fgsm"}


@pytest.mark.parametrize(
    "options", [{"averaging": "ema"}, {"averaging": "swa", "average_start": 1}]
)
def test_the_weights_of_a_finished_run_are_those_of_its_table(options, tmp_path: Path) -> None:
    """Averages are evaluated; the checkpoint to go on from holds the live weights."""
    out = str(tmp_path / "run")
    summary = train(RunRequest(**AVERAGED, options=options, out=out), Console())
    for which in ("best", "last"):
        found = evaluate_run(out, "clean,fgsm", which=which, limit=AVERAGED["test_limit"])
        assert found == summary[which]


def test_the_best_epoch_is_chosen_under_quick(tmp_path: Path) -> None:
    out = tmp_path / "run"
    chosen = SMALL | {
        "select_attack": "quick",
        "epochs": 3,
        "lr": 0.05,
        "test_attacks": "clean,quick",
    }
    summary = train(RunRequest(**chosen, out=str(out)), Console())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    scores = [(line["val_quick_percent"], line["val_clean_percent"]) for line in lines]
    assert summary["best_epoch"] == scores.index(max(scores)) + 1
    low, high = lines[0]["val_quick_interval_percent"]
    assert low <= scores[0][0] <= high
    assert evaluate_run(str(out), "quick", limit=chosen.get("test_limit")) == {
        "quick": summary["best"]["quick"]
    }


def test_a_finished_run_is_not_evaluated_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastadv.run.own_scores.run_evaluation", None)
    written = json.loads((run / "summary.json").read_text())
    del written["checksum"]
    assert resume(str(run), Console()) == written


def test_a_run_whose_checkpoint_is_missing_does_not_restart(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(RunRequest(**SMALL, out=str(out)), Console())
    best = (out / "best.pt").read_bytes()
    (out / "last.pt").unlink()
    (out / "previous.pt").unlink()
    with pytest.raises(UserError, match=r"last\.pt is missing"):
        resume(str(out), Console())
    assert (out / "best.pt").read_bytes() == best


def test_an_exported_network_holds_how_to_build_it(run: Path, tmp_path: Path) -> None:
    export_run(str(run), tmp_path / "model.safetensors", "last")
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        facts = file.metadata()
    told = {"model": "preact_resnet18", "width": "2", "in_channels": "1", "num_classes": "10"}
    told |= {"shortcut": "None", "normalize": "True", "dropout": "0.0"}
    assert facts | told == facts
    with pytest.raises(UserError, match="There is no folder"):
        export_run(str(run), tmp_path / "missing" / "model.safetensors", "last")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"test_attacks": "clean,foo"}, "Unknown attack 'foo'"),
        ({"test_attacks": ""}, "--test-attacks is empty"),
        ({"select_attack": "pgd-10,fgsm"}, "pgd-10,fgsm"),
        ({"momentum": -1.0}, "--momentum must"),
        ({"momentum": 2.0}, "--momentum must"),
        ({"weight_decay": -1.0}, "--weight-decay must"),
        ({"momentum": 0.0, "nesterov": True}, "--nesterov"),
        ({"max_grad_norm": 0.0}, "--max-grad-norm must"),
        ({"amp_dtype": "fp16"}, "add --amp"),
        ({"seed": 10**20}, "--seed must"),
        ({"seed": -1}, "--seed must"),
    ],
)
def test_settings_that_would_fail_late_or_do_harm_are_refused_at_once(settings, sentence) -> None:
    with pytest.raises(UserError, match=sentence):
        resolve_run(RunRequest(**settings))


def test_the_width_of_a_preset_is_its_own_networks() -> None:
    assert resolve_run(RunRequest()).width == 16
    assert resolve_run(RunRequest(model="wide_resnet34_10")).width is None
    assert resolve_run(RunRequest(model="wide_resnet34_10", width=2)).width == 2


def test_unusable_devices_are_refused() -> None:
    for name in ("mps", "meta", "gpu"):
        with pytest.raises(UserError, match="Unknown device"):
            choose_device(name)


def test_a_stop_while_averages_are_evaluated_changes_no_random_draw(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm statistics of an average need passes in training mode, which draw dropout masks."""
    usual = AVERAGED | {"dropout": 0.3, "options": {"averaging": "ema"}}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    expected = train(RunRequest(**usual, out=str(whole)), Console())
    real = OwnScores.evaluate

    def stopping(scores: OwnScores, *inputs: object) -> object:
        scores.job.asked_to_stop = lambda: True
        return real(scores, *inputs)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(OwnScores, "evaluate", stopping)
        with pytest.raises(Interrupted):
            train(RunRequest(**usual, out=str(stopped)), Console())
    assert resume(str(stopped), Console())["last"] == expected["last"]
    saved = [checkpoint.load(out / "last.pt")["model"] for out in (whole, stopped)]
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


def test_a_run_resumes_only_with_its_own_data(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(RunRequest(**SMALL, out=str(out)), Console())
    config = out / "config.toml"
    edit(config, "limit = 96", "limit = 160")
    with pytest.raises(UserError, match=r"The run had .* resume with the same data"):
        resume(str(out), Console())


def test_an_extended_run_deletes_its_earlier_results(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer"
    shutil.copytree(run, out)
    config = out / "config.toml"
    edit(config, "epochs = 2", "epochs = 3")

    def full(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EpochLoop, "final_test", full)
        with pytest.raises(KeyboardInterrupt):
            resume(str(out), Console())
    assert not (out / "summary.json").exists()
    assert resume(str(out), Console())["best_epoch"] <= 3
    assert [line["epoch"] for line in lines(out)] == [1, 2, 3]


def test_two_runs_started_at_once_have_their_own_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = resolve_run(RunRequest())
    names = {_free_name(config) for _ in range(3)}  # none has written its config.toml yet
    assert len(names) == 3
    assert Path("runs/apart-digits") in names


def test_a_closed_output_pipe_does_not_end_a_run(tmp_path: Path) -> None:
    words = "train --method fast --epochs 2 --limit 96 --width 2 --test-limit 32 --mode eager"
    words += " --select-attack pgd-1 --test-attacks clean"
    command = f"{sys.executable} -P -m fastadv {words} --out run | head -1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith("fast on digits")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best_epoch"] >= 1
