"""What ``fastadv export`` writes says all that builds the network again, whatever it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError
from fastadv.models import MODELS
from fastadv.run import provenance
from fastadv.run.built_for import BuiltFor
from fastadv.run.configured_model import configured_model
from fastadv.run.export import export_run
from fastadv.run.request import RunRequest
from fastadv.run.resolve import resolve_run
from fastadv.run.run_folder import RunFolder
from fastadv.run.saved_models import load_model
from fastadv.storage import checkpoint

OWN: dict[str, dict[str, Any]] = {name: {} for name in MODELS}
OWN["preact_resnet18"] = {"width": 4, "shortcut": "raw"}
OWN["resnet18"] = {"width": 4, "stem": "imagenet"}
OWN["resnet50"] = {"width": 4}
OWN["wide_resnet28_10"] = {"width": 1, "depth": 10}
OWN["wide_resnet32_10"] = {"width": 1}
OWN["wide_resnet34_10"] = {"width": 1, "dropout": 0.3}
OWN["vgg16"] = {"width": 4}
OWN["dla"] = {"width": 4}
LIBRARIES: dict[str, dict[str, Any]] = {
    "timm:test_resnet": {},
    "timm:vit_tiny_patch16_224": {"depth": 1},
    "torchvision:vit_b_16": {},
    "torchvision:mobilenet_v3_small": {"normalize": False},
}
QUICK = {"preact_resnet18", "wide_resnet28_10", "timm:test_resnet"}


def run_of(path: Path, name: str, **settings: Any) -> BuiltFor:
    """A run folder with weights of the network ``name`` as drawn, on data that are not there."""
    request = RunRequest(method="fast", data="npz:/nowhere.npz", model=name, **settings)
    config = resolve_run(request)
    classes = ("plum", "pear", "fig")
    own = BuiltFor(3, 3, (32, 32), (0.4, 0.5, 0.6), (0.2, 0.3, 0.25), classes)
    folder = RunFolder.create(str(path), config)
    torch.manual_seed(1)
    model = configured_model(config, **own.facts())
    with torch.no_grad():
        model.train()(torch.rand(4, 3, 32, 32))  # moves the statistics
    weights = {"model": model.state_dict(), "built_for": own.saved()}
    checkpoint.save(folder.best, weights | {"configuration": provenance.configuration(config)})
    return own


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in OWN | LIBRARIES
    ],
)
def test_the_same_logits_without_an_option(name: str, tmp_path: Path) -> None:
    if ":" in name:
        import_torchvision()
        pytest.importorskip(name.partition(":")[0])
    own = run_of(tmp_path / "run", name, **(OWN | LIBRARIES)[name])
    file = tmp_path / "model.safetensors"
    export_run(str(tmp_path / "run"), file)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = load_model(str(tmp_path / "run"))(x)
        assert torch.equal(load_model(str(file))(x), expected)
    with safe_open(file, "pt") as opened:
        notes = opened.metadata()
    for fact in ("mean", "std", "image_size", "classes"):
        assert tuple(json.loads(notes[fact])) == getattr(own, fact)
    assert (notes["norm"], float(notes["eps"])) == ("linf", 8 / 255)


def test_in_a_fresh_process(tmp_path: Path) -> None:
    run_of(tmp_path / "run", "preact_resnet18", width=2)
    export_run(str(tmp_path / "run"), tmp_path / "model.safetensors")
    x = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    code = (
        "import torch, fastadv; x = torch.linspace(0, 1, 3072).view(1, 3, 32, 32);"
        f"print(fastadv.load_model({str(tmp_path / 'model.safetensors')!r})(x).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = load_model(str(tmp_path / "run"))(x)
    torch.testing.assert_close(torch.tensor(json.loads(done.stdout)), expected)


def test_the_digest_of_the_configuration_is_that_of_the_training(tmp_path: Path) -> None:
    one = RunRequest(method="fast", data="npz:/a.npz", seed=1)
    same = RunRequest(method="fast", data="npz:/b.npz", seed=1, out="elsewhere", keep="best")
    other = RunRequest(method="fast", data="npz:/a.npz", seed=2)
    digests = [provenance.configuration_digest(resolve_run(each)) for each in (one, same, other)]
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("note", "value"),
    [
        ("image_size", "[8]"),
        ("image_size", "[0, 8]"),
        ("image_size", "[99999999, 8]"),
        ("image_size", "{"),
        ("width", "123456"),
        ("width", "wide"),
        ("dropout", "much"),
    ],
)
def test_a_note_that_fits_no_network(note: str, value: str, tmp_path: Path) -> None:
    run_of(tmp_path / "run", "preact_resnet18", width=2)
    file = tmp_path / "model.safetensors"
    export_run(str(tmp_path / "run"), file)
    with safe_open(file, "pt") as opened:
        notes, state = opened.metadata(), {n: opened.get_tensor(n) for n in opened.keys()}  # noqa: SIM118
    save_file(state, file, metadata=notes | {note: value})
    with pytest.raises(UserError):
        load_model(str(file))
