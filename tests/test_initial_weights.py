"""``--init``: a run that begins with the weights of another run, or of a file from elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_begun_with import SMALL, stopped
from test_resume import one_thread, same
from torch import Tensor

from fastadv.errors import UserError
from fastadv.printing.terminal import Terminal
from fastadv.run import places
from fastadv.run.config_file import from_bytes, to_toml
from fastadv.run.console import Console
from fastadv.run.export import export_run
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run, resolve_stored
from fastadv.run.session import Session
from fastadv.run.train import resume, train
from fastadv.storage import checkpoint

BEGIN: dict[str, Any] = SMALL | {
    "keep": "best,last,previous,every-1",
    "method": "standard",
    "seed": 3,
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "standard"
    train(RunRequest(**BEGIN, out=str(out)), Console())
    return out


def session(init: Path, **settings: Any) -> Session:
    return Session.build(resolve_run(RunRequest(**SMALL | settings, init=str(init))))


def weights(path: Path) -> dict[str, Tensor]:
    return checkpoint.load(path)["model"]


def assert_begins_with(found: Session, expected: dict[str, Tensor], but: str = "nothing") -> None:
    state = found.model.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        if not name.startswith(but):
            assert torch.equal(state[name], value), name


@pytest.mark.parametrize("file", ["", "best.pt", "last.pt", "epochs/0001.pt"])
def test_a_run_begins_with_the_weights_of_another(begun: Path, file: str) -> None:
    found = session(begun / file if file else begun)
    assert_begins_with(found, weights(begun / (file or "best.pt")))
    assert found.initial is not None
    assert found.initial.said == "weights of standard"


def test_files_from_elsewhere(begun: Path, tmp_path: Path) -> None:
    """What fastadv exports, and a plain state dict under a wrapper's names."""
    export_run(str(begun), tmp_path / "own.safetensors")
    assert_begins_with(session(tmp_path / "own.safetensors"), weights(begun / "best.pt"))
    state = {n: v for n, v in weights(begun / "last.pt").items() if "normalize" not in n}
    torch.save({"state_dict": {f"module.{n}": v for n, v in state.items()}}, tmp_path / "x.pth")
    found = session(tmp_path / "x.pth")
    own = {n: v for n, v in found.model.state_dict().items() if n.startswith("normalize")}
    assert own
    assert_begins_with(found, own | state)
    assert found.initial is not None
    assert "scaled by the mean and deviation of digits (--no-normalize" in found.initial.said
    assert session(tmp_path / "x.pth", normalize=False).initial is not None


def test_pixels_stay_scaled_as_the_weights_were_trained(begun: Path, tmp_path: Path) -> None:
    state = {n: v.contiguous() for n, v in weights(begun / "best.pt").items()}
    state["normalize.mean"] = state["normalize.mean"] + 0.1
    save_file(state, tmp_path / "other.safetensors")
    found = session(tmp_path / "other.safetensors")
    assert_begins_with(found, state)
    assert found.initial is not None
    assert "mean and deviation in the file" in found.initial.said
    with pytest.raises(UserError, match="omit --no-normalize"):
        session(tmp_path / "other.safetensors", normalize=False)
    with pytest.raises(UserError, match=r"scales pixels .* add --normalize"):
        session(begun, normalize=False)


def test_a_classifier_for_other_classes_is_drawn_anew(begun: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (80, 8, 8, 1)).astype(np.uint8)
    labels = np.arange(80) % 4
    both = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "few.npz", **both)
    settings = {"data": f"npz:{tmp_path / 'few.npz'}", "limit": None, "val_fraction": 0.2}
    settings |= {"batch_size": 8, "pad": 0}
    found = session(begun, **settings)
    fresh = Session.build(resolve_run(RunRequest(**SMALL | settings))).model.state_dict()
    expected = weights(begun / "best.pt")
    heads = {n: fresh[n] for n in fresh if n.startswith("linear")}
    assert {tuple(value.shape) for value in heads.values()} == {(4, 16), (4,)}
    assert_begins_with(found, expected | heads)
    assert found.initial is not None
    assert "new classifier linear: 4 classes, 10 in the file" in found.initial.said


def test_weights_of_another_network_are_refused(begun: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not fit preact_resnet18: its .* has shape"):
        session(begun, width=4)
    with pytest.raises(UserError, match="does not fit vgg"):
        session(begun, model="vgg16", width=2)
    with pytest.raises(UserError, match="There is no"):
        session(tmp_path / "none.pt")
    (tmp_path / "x.pt").write_bytes(b"no weights")
    with pytest.raises(UserError, match=r"damaged or no file of torch.save"):
        session(tmp_path / "x.pt")


def test_a_run_that_has_begun_needs_the_file_no_more(begun: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(begun, source)
    with one_thread():
        request = SMALL | {"init": str(source)}
        train(RunRequest(**request, out=str(tmp_path / "whole")), Console())
        cut = stopped(tmp_path / "cut", init=str(source))
        shutil.rmtree(source)
        resume(str(cut), Console())
    same(cut, tmp_path / "whole")
    recorded = checkpoint.load(cut / "last.pt")["provenance"]["digests"]
    assert recorded == checkpoint.load(tmp_path / "whole" / "last.pt")["provenance"]["digests"]
    assert len(recorded["initial weights"]) == 32


def test_a_run_begun_without_weights_cannot_get_some(begun: Path, tmp_path: Path) -> None:
    cut = stopped(tmp_path / "cut")
    text = (cut / "config.toml").read_text().splitlines()
    (cut / "config.toml").write_text("\n".join([f'init = "{begun}"', *text[:-1]]))
    with pytest.raises(UserError, match="initial weights is not what it was begun with"):
        resume(str(cut), Console())


def test_the_path_is_stored_whole_and_what_was_understood_is_said(
    begun: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    monkeypatch.chdir(begun.parent)
    config = resolve_run(places.absolute(RunRequest(**SMALL, init=begun.name)))
    assert config.init == str(begun)
    stored = resolve_stored(from_bytes(to_toml(config).encode(), Path("config.toml")))
    assert stored.init == str(begun)
    out = Terminal(width=300)
    train(RunRequest(**SMALL, init=begun.name, out=str(tmp_path / "run")), Console(out))
    assert "standard: weights of standard" in capsys.readouterr().out


def test_a_folder_of_somebody_else_has_no_file_read(begun: Path, tmp_path: Path) -> None:
    cut = stopped(tmp_path / "cut", init=str(begun))
    moved = tmp_path / "moved"
    shutil.copytree(cut, moved)
    (moved / "last.pt").unlink()
    (moved / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="was not begun here and holds no checkpoint"):
        resume(str(moved), Console())
    shutil.copyfile(cut / "last.pt", moved / "last.pt")
    resume(str(moved), Console())
