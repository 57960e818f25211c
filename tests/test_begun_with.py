"""A resumed run is checked against what it began with: code, keys, teachers, data, settings."""

from __future__ import annotations

import dataclasses
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edited import edit

from fastadv.data.array_file import user_cache
from fastadv.errors import Interrupted, UserError
from fastadv.run import provenance
from fastadv.run.console import Console
from fastadv.run.epoch_loop import EpochLoop
from fastadv.run.export import export_run
from fastadv.run.finished import evaluate_run
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.saved_models import load_model
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint, sealed
from fastadv.storage.trust import trusting

SMALL: dict[str, Any] = {
    "method": "fast", "width": 2, "epochs": 2, "limit": 48, "test_limit": 16, "mode": "eager",
    "test_attacks": "clean", "select_attack": "fgsm",
}  # fmt: skip


def stopped(out: Path, **settings: Any) -> Path:
    """A run after the first of two epochs."""
    original = EpochLoop._train_epoch

    def once(self: Any) -> None:
        if self.progress.epoch == 1:
            raise Interrupted("stop")
        original(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EpochLoop, "_train_epoch", once)
        with pytest.raises(Interrupted):
            train(RunRequest(**SMALL | settings, out=str(out)), Console())
    return out


# -- code -----------------------------------------------------------------------------------------


@pytest.fixture
def own_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``module:callable`` of a network in a file of the user's."""
    (tmp_path / "networks_of_mine.py").write_text(
        "import fastadv\n"
        "def net(num_classes, in_channels):\n"
        "    return fastadv.build_model('preact_resnet18', width=2, num_classes=num_classes,\n"
        "                               in_channels=in_channels)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "networks_of_mine", None)
    del sys.modules["networks_of_mine"]
    return "networks_of_mine:net"


def test_a_run_with_a_custom_network_is_resumed_and_evaluated(
    own_network: str, tmp_path: Path
) -> None:
    run = stopped(tmp_path / "run", model=own_network, width=None, normalize=False)
    assert resume(str(run), Console())["n"] == 16
    assert evaluate_run(str(run), "clean", limit=8).n == 8


def test_code_that_was_edited_since_is_reported(
    own_network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(tmp_path / "run", model=own_network, width=None, normalize=False)
    evaluate_run(str(out), "clean")
    code = tmp_path / "networks_of_mine.py"
    code.write_text(code.read_text() + "# edited\n")
    with pytest.warns(UserWarning, match="not what .* was trained with"):
        evaluate_run(str(out), "fgsm")
    capsys.readouterr()
    resume(str(out), Console())
    assert "source of the network" in " ".join(capsys.readouterr().out.split())


def test_a_copy_an_edit_and_another_user_need_trust_code(
    own_network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stopped(tmp_path / "run", model=own_network, width=None, normalize=False)

    def refused_but_trusted(folder: Path) -> None:
        for read in (
            lambda: resume(str(folder)),
            lambda: evaluate_run(str(folder), "clean", limit=8),
        ):
            with pytest.raises(UserError, match="--trust-code"):
                read()
        with trusting(True):
            assert evaluate_run(str(folder), "clean", limit=8).n == 8

    copy = shutil.copytree(run, tmp_path / "copy")
    refused_but_trusted(copy)
    with trusting(True):
        assert resume(str(copy), Console())["n"] == 16
    with monkeypatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path / "of another user"))
        refused_but_trusted(run)
        stopped(tmp_path / "theirs")  # makes that user's own key
        refused_but_trusted(run)
    whole = (run / "config.toml").read_text()
    edit(run / "config.toml", "test_limit = 16", "test_limit = 15")
    refused_but_trusted(run)
    (run / "config.toml").write_text(whole)
    assert resume(str(run), Console())["n"] == 16


def test_a_key_that_other_users_can_read_is_refused(
    own_network: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    run = stopped(tmp_path / "run", model=own_network, width=None, normalize=False)
    (tmp_path / "state" / "fastadv" / "key").chmod(0o644)
    with pytest.raises(UserError, match="--trust-code"):
        evaluate_run(str(run), "clean", limit=8)


# -- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("lr", r"^lr = .*$", "lr = 0.0125"),
        ("eps", r"^eps = .*$", "eps = 0.0625"),
        ("seed", r"^seed = 0$", "seed = 1"),
        ("batch_size", r"^batch_size = .*$", "batch_size = 63"),
        ("amp", r"^amp = false$", "amp = true"),
        ("momentum", r"^momentum = .*$", "momentum = 0.5"),
        ("option shrink", r"^shrink = 0.0$", "shrink = 0.5"),
    ],
)
def test_a_changed_training_setting_is_refused_on_resume(
    name: str, old: str, new: str, tmp_path: Path
) -> None:
    run = stopped(tmp_path / "run")
    text = (run / "config.toml").read_text()
    found = re.search(old, text, re.MULTILINE)
    assert found is not None
    edit(run / "config.toml", found[0], new)
    with pytest.raises(UserError) as refusal:
        resume(str(run), Console())
    before, after = (part.partition(" = ")[2].removesuffix(".0") for part in (found[0], new))
    said = str(refusal.value).lower()
    assert f"begun with {name} {before}".lower() in said
    assert f"now says {after}" in said


REFUSED = {
    "select": "test", "select_attack": "pgd-20", "eval_alpha": 0.1,
    "lr": 0.25, "val_fraction": 0.25, "augmentation": "rotate", "loader": "dali", "width": 3,
}  # fmt: skip
HARMLESS = {
    "test_attacks": "fgsm", "test_limit": 9, "eval_every": 2, "eval_train": 8, "save_every": 3,
    "keep": ("last", "every-2"), "data": "npz:elsewhere.npz", "data_root": "/data",
    "download": True,
}  # fmt: skip
OF_BITS = {"epochs": 9, "device": "cuda:1", "mode": "compiled", "deterministic": True}
SILENT = {"out": "elsewhere", "checkpoint_minutes": 1.0}


def facts(**changed: Any) -> dict[str, Any]:
    """What a checkpoint of a run with these settings says it depends on."""
    config = dataclasses.replace(resolve_run(RunRequest(**SMALL)), **changed)
    machine = {"threads": 2, "processor": "CPU"}
    text = provenance.configuration(config)
    return {"configuration": text, "digests": {}, "machine": machine}


def test_what_an_edited_configuration_may_change() -> None:
    """Every setting is refused with the reason, or said; all that is not named here decides what
    is trained."""
    for name, value in REFUSED.items():
        why = "best epoch is chosen" if name.startswith(("sel", "eval")) else "what is trained"
        with pytest.raises(UserError, match=f"begun with {name} .*{why}.*: restore it"):
            provenance.compare(facts(), facts(**{name: value}))
    for name, value in HARMLESS.items():
        (sentence,) = provenance.compare(facts(), facts(**{name: value}))
        assert sentence.startswith("settings have changed, and change no weights: ")
        assert f" {name} " in sentence
    # The cache of a run that came from elsewhere, which nobody has set.
    assert not provenance.compare(facts(), facts(data_root=str(user_cache())))
    for name, value in OF_BITS.items():
        (sentence,) = provenance.compare(facts(), facts(**{name: value}))
        assert "not bit for bit" in sentence
        assert f" {name} " in sentence
    for name, value in SILENT.items():
        assert not provenance.compare(facts(), facts(**{name: value}))
    now = facts()
    now["machine"] = {"threads": 4, "processor": "CPU"}
    (sentence,) = provenance.compare(facts(), now)
    assert sentence.endswith("so not bit for bit: threads 2 before, 4 now.")


def test_changed_evaluations_are_said_and_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(tmp_path / "run", keep="best,last")
    edit(run / "config.toml", "test_limit = 16", "test_limit = 9")
    edit(run / "config.toml", "best,last", "last,every-1")
    capsys.readouterr()
    assert resume(str(run), Console())["n"] == 9
    said = " ".join(capsys.readouterr().out.split())
    assert "keep best,last before, last,every-1 now; test_limit 16 before, 9 now" in said
    assert "not bit for bit" not in said
    assert [file.name for file in (run / "epochs").iterdir()] == ["0002.pt"]


def test_a_run_of_an_older_version_lacks_settings(tmp_path: Path) -> None:
    """Its file is as it was written; of one that was edited, a line may be lost."""
    run = stopped(tmp_path / "run")
    lines = (run / "config.toml").read_text().splitlines(keepends=True)[:-1]
    text = "".join(line for line in lines if not line.startswith(("skip_broken", "deterministic")))
    (run / "config.toml").write_text(sealed.seal_text(text))
    with trusting(True), pytest.raises(UserError) as refused:
        resume(str(run), Console())
    assert str(refused.value) == (
        "The run was begun with an older fastadv, which did not have skip_broken, deterministic: "
        "use that version for it, or train into another --out."
    )
    (run / "config.toml").write_text(text)
    with pytest.raises(UserError, match="lacks skip_broken, deterministic; restore its original"):
        resume(str(run), Console())


def test_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, keep in (("run", "best,last"), ("without", "best")):
        run = tmp_path / name
        train(RunRequest(**SMALL | {"epochs": 1, "keep": keep}, out=str(run)))
        capsys.readouterr()
        resume(str(run), Console())
        said = " ".join(capsys.readouterr().out.split())
        assert f"{run} has finished; there is nothing left to train" in said
        assert "best epoch 1" in said


def test_fewer_epochs_than_were_trained(tmp_path: Path) -> None:
    run = stopped(tmp_path / "run", epochs=3)
    resume(str(run), Console())
    edit(run / "config.toml", "epochs = 3", "epochs = 1")
    with pytest.raises(UserError, match="trained for more than 1 epochs already"):
        resume(str(run), Console())


# -- data and teachers ----------------------------------------------------------------------------


def unlabelled(path: Path, change: Callable[[dict[str, np.ndarray]], None] | None = None) -> Path:
    random_numbers = np.random.default_rng(0)
    arrays = {
        "images": random_numbers.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8),
        "labels": np.arange(40) % 10,
    }
    if change is not None:
        change(arrays)
    np.savez(path, **arrays)
    return path


def another_label(arrays: dict[str, np.ndarray]) -> None:
    arrays["labels"][[0, 1]] = arrays["labels"][[1, 0]]


def another_pixel(arrays: dict[str, np.ndarray]) -> None:
    arrays["images"][7, 3, 3, 0] ^= 1


def test_other_unlabelled_images_are_refused(tmp_path: Path) -> None:
    file = unlabelled(tmp_path / "more.npz")
    run = stopped(tmp_path / "run", unlabelled=str(file))
    for change in (another_label, another_pixel):
        unlabelled(file, change)
        with pytest.raises(UserError, match="--unlabelled data is not what it was begun with"):
            resume(str(run), Console())
    unlabelled(file)
    assert resume(str(run), Console())["n"] == 16


@pytest.mark.parametrize("mode", ["eager", pytest.param("auto", marks=pytest.mark.slow)])
def test_another_teacher_is_refused(tmp_path: Path, mode: str) -> None:
    for name, seed in (("clean", 0), ("robust", 1), ("other", 2)):
        settings = SMALL | {"epochs": 1, "seed": seed, "shortcut": "raw"}
        train(RunRequest(**settings, out=str(tmp_path / name)), Console())
    teachers = {"target": "distillation", "teachers": f"{tmp_path}/robust,{tmp_path}/clean"}
    run = stopped(tmp_path / "run", options=teachers, mode=mode)
    best, config = tmp_path / "robust" / "best.pt", tmp_path / "robust" / "config.toml"
    weights, text = best.read_bytes(), config.read_text()
    for name in ("best.pt", "config.toml"):
        shutil.copy(tmp_path / "other" / name, tmp_path / "robust" / name)
    with pytest.raises(UserError, match="teacher 1 is not what it was begun with"):
        resume(str(run), Console())
    best.write_bytes(weights)
    config.write_text(text)
    edit(config, 'shortcut = "raw"', 'shortcut = "preact"')  # the same weights, another network
    with pytest.raises(UserError, match=r"best\.pt is of a run with shortcut raw"):
        resume(str(run), Console())
    config.write_text(text)
    assert resume(str(run), Console())["n"] == 16


def test_missing_best_weights_are_reported_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = stopped(tmp_path / "run")
    (out / "best.pt").unlink()
    capsys.readouterr()
    resume(str(out), Console())
    assert "There is no checkpoint" in capsys.readouterr().out.partition("epoch   2")[0]


def test_weights_of_another_run_of_the_same_network_are_refused(tmp_path: Path) -> None:
    one, other = stopped(tmp_path / "one"), stopped(tmp_path / "other", seed=1)
    shutil.copy(other / "best.pt", one / "best.pt")
    for call in (
        lambda: evaluate_run(str(one), "clean"),
        lambda: export_run(str(one), tmp_path / "weights.safetensors"),
        lambda: load_model(str(one), 10, 1),
        lambda: resume(str(one), Console()),
    ):
        with pytest.raises(UserError, match=r"best\.pt is of a run with seed 1"):
            call()


def test_missing_averages_are_not_replaced_by_the_live_weights(tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(RunRequest(**SMALL, options={"averaging": "ema"}, out=str(out)), Console())
    (out / "averaged.pt").unlink()
    with pytest.raises(UserError, match=r"averaged\.pt is missing"):
        evaluate_run(str(out), "clean", which="last")


def test_an_export_overwrites_nothing_of_the_run(tmp_path: Path) -> None:
    out = stopped(tmp_path / "run")
    before = (out / "best.pt").read_bytes()
    with pytest.raises(UserError, match="a file of the run itself"):
        export_run(str(out), out / "best.pt")
    assert (out / "best.pt").read_bytes() == before


def test_another_torch_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stopped(tmp_path / "run")
    capsys.readouterr()
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    assert resume(str(run), Console())["n"] == 16
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("warning:") == 1
    assert "now" in shown
    assert "torch" in shown
    assert "1.0.0" in shown


@pytest.mark.parametrize("of", [None, 3, "no = [toml", {"not": "a text"}])
def test_weights_without_the_identity_of_their_run_are_refused(tmp_path: Path, of: object) -> None:
    out = stopped(tmp_path / "run")
    saved = checkpoint.load(out / "best.pt")
    checkpoint.save(out / "best.pt", saved | {"configuration": of})
    with pytest.raises(UserError, match="does not say which run"):
        evaluate_run(str(out), "clean")
