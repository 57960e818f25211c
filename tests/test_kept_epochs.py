"""``--keep every-N``: the weights of epochs, as they were evaluated, stay and can be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from edited import edit
from safetensors.torch import load_file

from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.export import export_run
from fastadv.run.finished import evaluate_run
from fastadv.run.loaded import load_run
from fastadv.run.pairs import compare_runs
from fastadv.run.request import RunRequest
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import fingerprint, load_model
from fastadv.run.several import evaluate_runs
from fastadv.run.train import resume, train
from fastadv.run.which import one_named, weights_file, weights_named
from fastadv.storage import checkpoint

SETTINGS: dict[str, Any] = {
    "method": "fast", "width": 2, "epochs": 3, "limit": 96, "batch_size": 32, "mode": "eager",
    "select_attack": "fgsm", "test_attacks": "clean,fgsm", "test_limit": 40, "eval_train": 30,
    "lr": 0.5, "keep": ("best", "last", "every-1"),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    train(RunRequest(**SETTINGS, out=str(out)), Console())
    return out


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(file: Path) -> dict[str, Any]:
    return dict(checkpoint.load(file)["model"])


def alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_every_epoch_has_its_file(run: Path) -> None:
    found = sorted(file.name for file in (run / "epochs").iterdir())
    assert found == ["0001.pt", "0002.pt", "0003.pt"]
    kept = {epoch: weights(run / "epochs" / f"{epoch:04d}.pt") for epoch in (1, 2, 3)}
    assert alike(kept[3], weights(run / "last.pt"))
    assert not alike(kept[2], kept[3])
    best = json.loads((run / "summary.json").read_text())["best_epoch"]
    assert alike(kept[best], weights(run / "best.pt"))
    assert (
        checkpoint.load(run / "epochs" / "0001.pt").keys()
        == checkpoint.load(run / "best.pt").keys()
    )


def test_a_run_that_was_read_is_one_line(run: Path, tmp_path: Path) -> None:
    test = json.loads((run / "summary.json").read_text())
    begins = f"<Run {run}: fast on digits, preact_resnet18, "
    for which, epoch in (("best", test["best_epoch"]), ("last", 3)):
        clean, fgsm = (f"{100 * test[which][attack]:.2f}" for attack in ("clean", "fgsm"))
        assert str(load_run(str(run), which)) == (
            f"{begins}{which} weights of epoch {epoch} of 3, test clean {clean} %, "
            f"test fgsm {fgsm} %>"
        )
    second = lines(run)[1]
    clean, fgsm = (f"{second[f'val_{attack}_percent']:.2f}" for attack in ("clean", "fgsm"))
    ends = f"weights of epoch 2 of 3, val clean {clean} %, val fgsm {fgsm} %>"
    assert repr(load_run(str(run), "2")) == begins + ends
    copy = tmp_path / "a\nname"
    shutil.copytree(run, copy)
    (copy / "summary.json").write_text("damaged")
    told = str(load_run(str(copy), "best"))
    assert "\n" not in told
    assert told.endswith(f"best weights of epoch {test['best_epoch']} of 3>")


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_epochs_line_is_found_again(run: Path, epoch: int) -> None:
    """Its accuracies on validation and on training images, from the file of its weights."""
    line = lines(run)[epoch - 1]
    for on, limit in (("val", None), ("train", SETTINGS["eval_train"])):
        found = evaluate_run(str(run), "clean,fgsm", which=str(epoch), on=on, limit=limit)
        shares = {name: line[f"{on}_{name}_percent"] / 100 for name in ("clean", "fgsm")}
        assert found == pytest.approx(shares, abs=1e-6)
        assert found.n == line[f"{on}_n"]
        ends = [end / 100 for end in line[f"{on}_fgsm_interval_percent"]]
        assert list(found.interval("fgsm")) == pytest.approx(ends, abs=1e-6)


@pytest.mark.parametrize(
    "options", [{"averaging": "ema"}, {"averaging": "swa", "average_start": 1}]
)
def test_averages_are_kept_where_they_are_evaluated(
    options: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = SETTINGS | {"options": options, "eval_every": 2, "keep": "best,last,every-3"}
    summary = train(RunRequest(**settings, out=str(out)), Console())
    assert [file.name for file in (out / "epochs").iterdir()] == ["0003.pt"]
    kept = weights(out / "epochs" / "0003.pt")
    assert alike(kept, weights(out / "averaged.pt"))
    assert not alike(kept, weights(out / "last.pt"))
    assert evaluate_run(str(out), "clean,fgsm", which="3", limit=40) == summary["last"]


def test_an_epoch_that_is_not_evaluated_is_kept(tmp_path: Path) -> None:
    """What is saved there does not change the run."""
    runs = tmp_path / "kept", tmp_path / "plain"
    for out, keep in zip(runs, ("last,every-1", "last"), strict=True):
        settings = SETTINGS | {"eval_every": 3, "keep": keep, "eval_train": None}
        settings["options"] = {"averaging": "ema"}
        train(RunRequest(**settings, out=str(out)), Console())
    assert len(list((runs[0] / "epochs").iterdir())) == 3
    assert not (runs[1] / "epochs").exists()
    assert alike(*(weights(out / "last.pt") for out in runs))
    assert all("val_clean_percent" not in line for line in lines(runs[0])[:2])
    first, second = ([line["loss"] for line in lines(out)] for out in runs)
    assert first == second


def test_every_command_takes_an_epoch(run: Path, tmp_path: Path) -> None:
    kept = weights(run / "epochs" / "0002.pt")
    file = run / "epochs" / "0002.pt"
    assert alike(dict(load_model(str(file)).state_dict()), kept)
    prints = [fingerprint(str(run / "epochs" / f"000{epoch}.pt")) for epoch in (1, 2, 3)]
    assert len({*prints}) == 3
    assert prints[2] == fingerprint(str(run / "last.pt"))
    assert alike(dict(load_run(str(run), "2").model.state_dict()), kept)
    export_run(str(run), tmp_path / "model.safetensors", "2")
    exported = load_file(tmp_path / "model.safetensors")
    assert alike(
        {name: exported[name] for name in kept if name in exported},
        {name: kept[name] for name in kept if name in exported},
    )
    assert len(exported) > 10
    table = evaluate_runs([str(run)], "clean", which="2", limit=20)
    assert table.which == ("epoch 2",)
    assert table.title == f"{run}, epoch 2 weights"
    other = tmp_path / "other"
    train(RunRequest(**SETTINGS | {"seed": 1}, out=str(other)), Console())
    (pair,) = compare_runs(str(run), str(other), "clean", which="2", limit=20)
    assert pair.which == "epoch 2"


def test_an_epoch_that_was_not_kept(run: Path, tmp_path: Path) -> None:
    sentence = r"has not kept the weights of epoch 7: it has those of 1, 2, 3\."
    with pytest.raises(UserError, match=sentence):
        evaluate_run(str(run), "clean", which="7")
    with pytest.raises(UserError, match=sentence):
        evaluate_runs([str(run)], "clean", which="7")
    copy = shutil.copytree(run, tmp_path / "copy")
    for epoch in range(4, 11):
        shutil.copy(copy / "epochs" / "0001.pt", copy / "epochs" / f"{epoch:04d}.pt")
    with pytest.raises(UserError, match="of its 10 kept epochs the first is 1 and the last 10"):
        load_run(str(copy), "11")
    shutil.rmtree(copy / "epochs")
    with pytest.raises(UserError, match="train with --keep every-10"):
        load_run(str(copy), "1")


def test_names_of_weights() -> None:
    assert weights_named("both") == ("best", "last")
    assert (
        weights_named("10") == weights_named("epoch 10") == weights_named("0010") == ("epoch 10",)
    )
    assert one_named("last") == "last"
    with pytest.raises(UserError, match="did you mean 'best'"):
        weights_named("bets")
    with pytest.raises(UserError, match="the number of an epoch"):
        weights_named("-1")
    with pytest.raises(UserError, match="choose best or last"):
        one_named("both")


def test_a_longer_run_keeps_the_files_it_had(run: Path, tmp_path: Path) -> None:
    """And what is kept may change on the way."""
    copy = shutil.copytree(run, tmp_path / "copy")
    before = {file.name: file.read_bytes() for file in (copy / "epochs").iterdir()}
    edit(copy / "config.toml", "epochs = 3", "epochs = 7")
    edit(copy / "config.toml", "every-1", "every-3")
    resume(str(copy), Console())
    found = {file.name: file.read_bytes() for file in (copy / "epochs").iterdir()}
    assert found.keys() == {*before, "0006.pt"}
    assert {name: found[name] for name in before} == before
    assert evaluate_run(str(copy), "clean", which="1", limit=8).n == 8  # of the shorter run


def test_weights_of_another_run_are_refused(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(RunRequest(**SETTINGS | {"epochs": 1, "seed": 1}, out=str(other)), Console())
    shutil.copy(run / "epochs" / "0001.pt", other / "epochs" / "0001.pt")
    with pytest.raises(UserError, match="of a run with seed 0"):
        load_run(str(other), "1")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", RunFolder(tmp_path / "run")
    elsewhere.mkdir()
    folder.path.mkdir()
    folder.epochs.symlink_to(elsewhere)
    with pytest.raises(UserError, match="is no folder"):
        folder.keep(1, {"model": {}})
    assert not list(elsewhere.iterdir())


def test_a_folder_called_epochs_may_be_a_run(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "epochs")
    assert load_model(str(tmp_path / "epochs" / "best.pt")) is not None
    assert weights_file(RunFolder(run), "best") == run / "best.pt"
