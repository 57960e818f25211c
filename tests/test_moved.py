"""A run depends neither on where it was started nor on where its data lie."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited import edit

import fastadv
from fastadv.errors import UserError
from fastadv.run.console import Console
from fastadv.run.export import export_run
from fastadv.run.finished import evaluate_run
from fastadv.run.loaded import OTHER_TEST_IMAGES, load_run
from fastadv.run.pairs import compare_runs
from fastadv.run.places import absolute, found_again, seen_from
from fastadv.run.request import RunRequest
from fastadv.run.request_file import with_file
from fastadv.run.saved_models import load_model
from fastadv.run.train import resume, train

SMALL: dict[str, Any] = {
    "method": "fast", "model": "preact_resnet18", "width": 2, "epochs": 2, "batch_size": 32,
    "mode": "eager", "select_attack": "fgsm", "test_attacks": "clean", "lr": 0.1,
}  # fmt: skip


def write_npz(file: Path, seed: int = 0, classes: int = 4, side: int = 8) -> None:
    draw = np.random.default_rng(seed)
    y = np.arange(120) % classes
    x = (draw.random((120, side, side)) * 120 + y[:, None, None] * 30).astype(np.uint8)
    np.savez(file, x_train=x[:80], y_train=y[:80], x_test=x[80:], y_test=y[80:])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data.npz and a run on it, runs/a, begun there with a relative path."""
    home = tmp_path_factory.mktemp("home")
    write_npz(home / "data.npz")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train(RunRequest(**SMALL, data="npz:data.npz", out="runs/a"), Console())
    return home


@pytest.fixture
def home(made: Path, tmp_path: Path) -> Path:
    """A copy of the folder elsewhere, as if it was moved; the original data are not there."""
    shutil.copytree(made, tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


@pytest.fixture(autouse=True)
def original_is_gone(made: Path, request: pytest.FixtureRequest) -> Any:
    """While a test with ``home`` runs, the data are not where the run was begun."""
    if "home" not in request.fixturenames:
        yield
        return
    home = request.getfixturevalue("home")
    assert home != made
    (made / "data.npz").rename(made / "hidden.npz")
    yield
    (made / "hidden.npz").rename(made / "data.npz")


def test_paths_are_absolute_and_seen_from_the_folder(made: Path) -> None:
    held = tomllib.loads((made / "runs/a/config.toml").read_text())
    assert held["data"] == f"npz:{made}/data.npz"
    assert held["places"] == {"data": ["../../data.npz"]}


def test_every_command_works_from_another_folder(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made / "runs/a", made / "runs/b")
    try:
        path = str(made / "runs/b")
        assert evaluate_run(path, "clean").n == 40
        edit(made / "runs/b/config.toml", "epochs = 2", "epochs = 3")
        assert len(resume(path, Console())["best"]) == 1
        assert "test images" in export_run(path, tmp_path / "model.safetensors")
    finally:
        shutil.rmtree(made / "runs/b")


def test_a_run_that_moved_with_its_data_finds_them(home: Path) -> None:
    run = str(home / "runs/a")
    scores = evaluate_run(run, "clean,fgsm")
    assert scores.n == 40
    edit(home / "runs/a/config.toml", "epochs = 2", "epochs = 3")
    resume(run, Console())
    assert len(load_run(run).metrics) == 3


def test_the_file_of_a_run_that_moved_begins_it_anew(home: Path) -> None:
    found = with_file(str(home / "runs/a/config.toml"), RunRequest(seed=3))
    assert found.data == f"npz:{home}/data.npz"
    assert (found.method, found.seed, found.out) == ("fast", 3, None)


def test_data_that_moved_alone_are_named(home: Path) -> None:
    run = home / "runs/a"
    evaluate_run(str(run), "clean,fgsm")
    (home / "data.npz").rename(home / "new.npz")
    for call in (
        lambda: resume(str(run), Console()),
        lambda: evaluate_run(str(run), "pgd-2"),
        lambda: evaluate_run(str(run), "clean", limit=20),
    ):
        with pytest.raises(UserError, match=r"looked at .*data\.npz and .*elsewhere/data\.npz\): "
                           "say where it is now with --data npz:PATH"):  # fmt: skip
            call()
    # What was found before needs no images.
    assert evaluate_run(str(run), "clean,fgsm").stored == ["clean", "fgsm"]
    told = evaluate_run(str(run), "clean,pgd-2", data=f"npz:{home}/new.npz")
    assert told.stored == ["clean"]
    edit(run / "config.toml", "epochs = 2", "epochs = 3")
    resume(str(run), Console(), moved={"data": f"npz:{home}/new.npz"})
    held = tomllib.loads((run / "config.toml").read_text())
    assert held["data"] == f"npz:{home}/new.npz"
    assert held["places"]["data"] == ["../../new.npz"]
    assert evaluate_run(str(run), "fgsm").n == 40


def test_resuming_on_other_data_is_refused(home: Path) -> None:
    write_npz(home / "other.npz", seed=1)
    run, data = home / "runs/a", f"npz:{home}/other.npz"
    edit(run / "config.toml", "epochs = 2", "epochs = 3")
    before = (run / "config.toml").read_bytes()
    with pytest.raises(UserError, match="is not what it was begun with"):
        resume(str(run), Console(), moved={"data": data})
    assert (run / "config.toml").read_bytes() == before


def test_other_data_are_evaluated_and_kept_apart(home: Path) -> None:
    write_npz(home / "other.npz", seed=1)
    run = str(home / "runs/a")
    own = evaluate_run(run, "clean")
    with pytest.warns(UserWarning, match="are not those that .* was begun with"):
        other = evaluate_run(run, "clean", data=f"npz:{home}/other.npz")
    assert (own.on, other.on) == ("test images", OTHER_TEST_IMAGES)
    assert other.stored == []
    assert own.facts["image_set"] != other.facts["image_set"]
    assert own.facts["network"] == other.facts["network"]
    x = torch.from_numpy(np.load(home / "other.npz")["x_test"])[:, None] / 255
    y = torch.from_numpy(np.load(home / "other.npz")["y_test"])
    right = (load_model(run)(x.float()).argmax(1) == y).float().mean()
    assert other["clean"] == pytest.approx(float(right))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"classes": 3}, "has 3 classes, and the network of .* is for 4"),
        ({"side": 6}, "are 6x6, and the network of .* is for 8x8"),
    ],
)
def test_data_of_another_kind_are_refused(kind: dict[str, int], says: str, home: Path) -> None:
    write_npz(home / "other.npz", **kind)
    with pytest.raises(UserError, match=says):
        evaluate_run(str(home / "runs/a"), "clean", data=f"npz:{home}/other.npz")


def test_export_and_compare_need_no_data(home: Path) -> None:
    run, copy = str(home / "runs/a"), str(home / "runs/b")
    shutil.copytree(run, copy)
    for path, which in ((run, "best"), (copy, "last")):
        evaluate_run(path, "fgsm", which=which)
    (home / "data.npz").unlink()
    said = export_run(run, home / "model.safetensors")
    assert "8 images of noise (the data are not there)" in said
    x = torch.rand(3, 1, 8, 8)
    again = load_model(str(home / "model.safetensors"))
    torch.testing.assert_close(again(x), load_model(run)(x), rtol=0, atol=0)
    with pytest.raises(UserError, match="hold the same weights"):
        next(compare_runs(run, str(shutil.copytree(run, home / "runs/c")), "fgsm"))


def test_a_loaded_run(home: Path) -> None:
    found = fastadv.load_run(str(home / "runs/a"))
    assert isinstance(found, fastadv.Run)
    assert not found.model.training
    assert (found.method, found.which, found.classes) == ("fast", "best", ())
    assert found.threat == fastadv.Threat("linf", found.config.eps)
    assert [line["epoch"] for line in found.metrics] == [1, 2]
    assert found.summary is not None
    images = torch.cat([x for x, _ in found.test])
    labels = torch.cat([y for _, y in found.test])
    assert images.shape == (40, 1, 8, 8)
    right = (found.model(images).argmax(1) == labels).float().mean()
    assert found.summary["best"]["clean"] == pytest.approx(float(right))
    assert len(found.training) + len(found.validation) == 80
    last = fastadv.load_run(str(home / "runs/a"), "last")
    assert last.summary is not None
    scores = fastadv.evaluate(last.model, last.test, ["clean"])
    assert scores["clean"] == pytest.approx(last.summary["last"]["clean"])


def test_a_loaded_run_without_its_data(home: Path) -> None:
    (home / "data.npz").unlink()
    found = fastadv.load_run(str(home / "runs/a"))
    assert found.model(torch.rand(2, 1, 8, 8)).shape == (2, 4)
    assert found.built_for.mean == pytest.approx(found.model.normalize.mean.flatten().tolist())
    for name in ("test", "validation", "training"):
        with pytest.raises(UserError, match="say where it is now with --data"):
            next(iter(getattr(found, name)))


def test_places_of_teachers_and_pseudo_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Path(name).mkdir()
    asked = RunRequest(
        data="cifar10",
        unlabelled="more.npz",
        init="~/weights.pt",
        options={"teachers": "one, two", "helper": None},
    )
    there = absolute(asked)
    assert there.data == "cifar10"
    assert there.data_root == f"{tmp_path}/data"
    assert there.unlabelled == f"{tmp_path}/more.npz"
    assert there.init == str(Path.home() / "weights.pt")
    assert there.options["teachers"] == f"{tmp_path}/one,{tmp_path}/two"
    run = tmp_path / "runs" / "a"
    beside = seen_from(run, there)
    assert beside["teachers"] == ("../../one", "../../two")
    moved = tmp_path / "new"
    (moved / "runs" / "a").mkdir(parents=True)
    Path("one").rename(moved / "one")
    found = found_again(there, beside, moved / "runs" / "a", {})
    assert found.options["teachers"] == f"{moved}/one,{tmp_path}/two"
    told = found_again(there, beside, run, {"teachers": "x,y", "data_root": "here"})
    assert told.options["teachers"] == f"{tmp_path}/x,{tmp_path}/y"
    assert told.data_root == f"{tmp_path}/here"


def test_a_method_of_a_plugin_names_its_file(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (home / "runs/a/config.toml").read_text()
    body = text.rpartition("# checksum")[0].replace('method = "fast"', 'method = "mine"')
    (home / "runs/a/config.toml").write_text(body + 'plugins = ["/my/file.py"]\n')
    with pytest.raises(UserError, match=r"add --plugin with the file it came from \(begun with "
                       r"/my/file\.py\)"):  # fmt: skip
        load_run(str(home / "runs/a"))


def test_the_command_line(home: Path, fastadv_command: Any) -> None:
    (home / "data.npz").rename(home / "new.npz")
    run, data = str(home / "runs/a"), f"npz:{home}/new.npz"
    done = fastadv_command("evaluate", run, "--data", data, "--attacks", "clean")
    assert done.code == 0
    done = fastadv_command("compare", run, run, "--data", data)
    assert "given twice" in done.err
    done = fastadv_command("evaluate", run, "--norm", "l2", "--data", data)
    assert "omit --norm, or the folder" in done.err
    done = fastadv_command("train", "--resume", run, "--data", data, "--epochs", "3")
    assert "omit --epochs" in done.err
    assert fastadv_command("train", "--resume", run, "--data", data).code == 0
