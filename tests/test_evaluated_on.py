"""``--on``: evaluation on the images that a run was trained on, or held out."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastadv.cli.main import main
from fastadv.data import load
from fastadv.data.dataset import split_validation
from fastadv.data.label_noise import noisy_labels
from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.finished import evaluate_run
from fastadv.run.pairs import compare_runs
from fastadv.run.request import RunRequest
from fastadv.run.saved_models import load_model
from fastadv.run.several import evaluate_runs
from fastadv.run.train import train
from fastadv.storage import checkpoint

NOISE = 0.3
SETTINGS: dict[str, Any] = {
    "method": "fast", "width": 2, "epochs": 1, "limit": 200, "batch_size": 32, "mode": "eager",
    "select_attack": "clean", "test_attacks": "clean", "test_limit": 16, "val_fraction": 0.2,
    "label_noise": NOISE,
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "run": {},
    "other": {"method": "standard"},
    "seed": {"seed": 1},
    "true": {"label_noise": 0.0},
    "tested": {"select": "test", "label_noise": 0.0},
    "tested-1": {"select": "test", "label_noise": 0.0, "seed": 1},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    for name, settings in RUNS.items():
        train(RunRequest(**SETTINGS | settings, out=str(place / name)), Console())
    return place


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """Copies, none of which was evaluated."""
    return shutil.copytree(trained, tmp_path / "runs")


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: Any) -> str:
    monkeypatch.setattr(sys, "argv", ["fastadv", *map(str, words)])
    with pytest.raises(SystemExit):
        main()
    told = capsys.readouterr()
    return " ".join((told.out + told.err).split())


def right(run: Path, images: Tensor, labels: Tensor) -> int:
    """The number of ``images`` (N,C,H,W) uint8 that the best network classifies as ``labels``."""
    with torch.no_grad():
        logits = load_model(str(run))(images.float() / 255)
    return int((logits.argmax(1) == labels).sum())


@pytest.mark.parametrize("name", ["run", "true"])
def test_the_accuracy_is_on_the_images_and_labels_trained_on(name: str, runs: Path) -> None:
    data = load("digits", limit=SETTINGS["limit"])
    rows, held_out = split_validation(data, SETTINGS["val_fraction"], 0)
    noise = 0.0 if name == "true" else NOISE
    labels = noisy_labels(data.train_labels, noise, 10, 0)
    on_train = evaluate_run(str(runs / name), "clean", on="train")
    assert on_train.n == len(rows)
    expected = right(runs / name, data.train_images[rows], labels[rows])
    assert on_train["clean"] * on_train.n == pytest.approx(expected, abs=1e-4)
    on_val = evaluate_run(str(runs / name), "clean", on="val")
    assert on_val.n == len(held_out)
    images, true = data.train_images[held_out], data.train_labels[held_out]
    expected = right(runs / name, images, true)
    assert on_val["clean"] * on_val.n == pytest.approx(expected, abs=1e-4)


def test_results_of_other_images_are_other_results(runs: Path) -> None:
    """With one number of images, and the same everything else."""
    run = str(runs / "run")
    found = {on: evaluate_run(run, "clean", on=on, limit=20) for on in ("test", "val", "train")}
    assert all(scores.stored == [] for scores in found.values())
    names = [line["evaluated_on"] for line in records(runs / "run")]
    assert names == ["test images", "validation images", "training images"]
    assert len({line["data"] for line in records(runs / "run")}) == 3
    for on, scores in found.items():
        again = evaluate_run(run, "clean", on=on, limit=20)
        assert again.stored == ["clean"]
        assert again == scores
        assert again.verdicts["clean"].facts["evaluated_on"] == scores.on
    assert evaluate_run(run, "clean", limit=20).stored == ["clean"]
    assert len(records(runs / "run")) == 3


def test_only_equal_sets_are_compared(runs: Path) -> None:
    def compared(one: str, other: str, on: str) -> list[Any]:
        return list(compare_runs(str(runs / one), str(runs / other), "clean", on=on))

    (pair,) = compared("run", "other", "train")
    assert pair.paired.n == 160
    assert pair.first.facts["evaluated_on"] == "training images"
    for on in ("train", "val"):
        with pytest.raises(UserError, match=r"different images or labels \(seed 0 and 1\)"):
            compared("run", "seed", on)
    with pytest.raises(UserError, match=r"\(label-noise 0\.3 and 0\)"):
        compared("run", "true", "train")
    with pytest.raises(UserError, match=r"\(select val and test\)"):
        compared("true", "tested", "train")
    (pair,) = compared("tested", "tested-1", "train")  # all training images, whatever the seed
    assert pair.paired.n == 200
    assert len(compared("run", "seed", "test")) == 1
    table = evaluate_runs([str(runs / "run"), str(runs / "other")], "clean", on="train")
    assert (table.n, table.on) == (160, "training images")
    with pytest.raises(UserError, match="different images or labels"):
        evaluate_runs([str(runs / "run"), str(runs / "seed")], "clean", on="train")


def test_settings_that_are_alike_do_not_hide_other_images(runs: Path, tmp_path: Path) -> None:
    """Two data sets of one name: only the evaluation shows that they differ."""
    for name, seed in (("a", 0), ("b", 1)):
        drawn = np.random.default_rng(seed).integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
        labels = np.arange(40) % 10
        file = tmp_path / f"{name}.npz"
        np.savez(file, x_train=drawn, y_train=labels, x_test=drawn, y_test=labels)
        settings = SETTINGS | {"data": f"npz:{file}", "limit": None, "batch_size": 8, "width": 2}
        train(RunRequest(**settings, out=str(tmp_path / name)), Console())
    with pytest.raises(UserError, match="evaluated on other images"):
        list(compare_runs(str(tmp_path / "a"), str(tmp_path / "b"), "clean", on="train"))


def test_a_run_without_validation_images(runs: Path) -> None:
    with pytest.raises(UserError, match="held out no validation images"):
        evaluate_run(str(runs / "tested"), "clean", on="val")
    assert evaluate_run(str(runs / "tested"), "clean", on="train").n == 200
    with pytest.raises(UserError, match="did you mean 'train'"):
        evaluate_run(str(runs / "run"), "clean", on="trian")


def test_the_commands_say_what_was_evaluated(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*words: Any) -> str:
        return said(capsys, monkeypatch, *words, "--attacks", "clean")

    found = told("evaluate", runs / "run", "--on", "train")
    assert "training accuracy, % of 160 images" in found
    wrong = records(runs / "run")
    assert wrong[0]["evaluated_on"] == "training images"
    assert "with the labels trained on (" in found
    assert "% of 160 labels are wrong)" in found
    true = told("evaluate", runs / "true", "--on", "train")
    assert "training accuracy" in true
    assert "wrong" not in true
    held_out = told("evaluate", runs / "run", "--on", "val", "--format", "markdown")
    assert "Validation accuracy, % of 40 images" in held_out
    assert "wrong" not in held_out
    usual = told("evaluate", runs / "run", "--limit", 20)
    assert "test accuracy, % of 20 images" in usual
    pair = told("compare", runs / "run", runs / "other", "--on", "train")
    assert "best weights, training images, linf eps" in pair


def test_where_only_test_images_are_evaluated(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = said(capsys, monkeypatch, "evaluate", runs / "run", "--on", "train", "--sanity")
    assert "omit --on" in found
    file = tmp_path / "weights.pt"
    torch.save(checkpoint.load(runs / "run" / "best.pt")["model"], file)
    words = ("--model", "preact_resnet18", "--weights", file, "--data", "digits", "--on", "train")
    found = said(capsys, monkeypatch, "evaluate", *words)
    assert "A network from elsewhere is evaluated on test images: omit --on train." in found
