"""Networks of timm and torchvision by name."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError
from fastadv.models import build_model, packaged
from fastadv.run import provenance
from fastadv.run.loaded import load_run
from fastadv.run.saved_models import load_model
from fastadv.storage import checkpoint

SIZE = (32, 32)
SHORT = (
    *("--epochs", 1, "--limit", 64, "--test-limit", 16, "--test-attacks", "clean"),
    *("--select-attack", "fgsm", "--out", "run"),
)


def made(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, num_classes=5, image_size=SIZE, **options)


def assert_equal(first: nn.Module, second: nn.Module) -> None:
    expected = second.state_dict()
    assert first.state_dict().keys() == expected.keys()
    assert all(torch.equal(own, expected[name]) for name, own in first.state_dict().items())


@pytest.fixture
def timm() -> Any:
    import_torchvision()
    return pytest.importorskip("timm")


def test_timms_network_is_the_librarys_own(timm: Any) -> None:
    """Also the same weights: an attempt to give the size must not draw any."""
    own = made("timm:test_resnet", in_channels=1)
    torch.manual_seed(0)
    assert_equal(own, timm.create_model("test_resnet", num_classes=5, in_chans=1))
    assert own.training
    assert all(module.training for module in own.modules())


def test_a_transformer_is_built_for_the_size_of_the_images(timm: Any) -> None:
    own = made("timm:vit_tiny_patch16_224", depth=1)
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=32, depth=1)
    assert_equal(own, theirs)
    assert own.get_parameter("pos_embed").shape[1] == 2 * 2 + 1
    assert own(torch.rand(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.parametrize("name", ["squeezenet1_1", "vit_b_16"])
def test_torchvisions_networks(name: str) -> None:
    sized = {"image_size": 32} if name == "vit_b_16" else {}
    with torch.device("meta"):
        own = made(f"torchvision:{name}")
        theirs = getattr(import_torchvision().models, name)(num_classes=5, **sized)
    shapes = {key: tensor.shape for key, tensor in own.state_dict().items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.state_dict().items()}


def test_normalisation_comes_first_and_dropout_is_given(timm: Any) -> None:
    own = made("timm:test_vit", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), dropout=0.25).eval()
    plain = made("timm:test_vit").eval()
    x = torch.rand(2, 3, 32, 32)
    scaled = (x - torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1)) / torch.tensor((0.2, 0.3, 0.4)).view(
        3, 1, 1
    )
    torch.testing.assert_close(own(x), plain(scaled))
    assert own.get_submodule("head_drop").p == 0.25


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("timm:resnt18", {}, "did you mean 'resnet18'"),
        ("torchvision:resnet19", {}, "did you mean 'resnet18'"),
        ("timm:zzzzzzzzzz", {}, "known are convnext_tiny"),
        ("timm:", {}, "Unknown network of timm"),
        ("timm:resnet18.a1_in1k", {}, "pretrained weights .* write timm:resnet18"),
        ("timm:hf-hub:timm/resnet18", {}, "Unknown network of timm"),
        ("torchvision:resnet18", {"in_channels": 1}, "3 channels, not 1"),
        ("timm:test_resnet", {"width": 3}, "unexpected keyword argument 'width'"),
        ("timm:vit_tiny_patch16_224", {"image_size": (8, 8)}, "images of 8x8 pixels"),
        ("timm:repghostnet_050", {"image_size": (4, 4), "mean": (0.5,) * 4}, "mean has 4 values"),
        ("torchvision:maxvit_t", {}, "cannot be built with .*input_size"),
        ("torchvision:alexnet", {}, "does not take images of 32x32 pixels"),
    ],
)
def test_impossible_requests_are_refused_in_one_sentence(
    timm: Any, name: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says) as raised:
        build_model(name, **{"image_size": SIZE, **options})
    assert "\n" not in str(raised.value)


def test_a_missing_library_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "timm" else find(name)
    )
    with pytest.raises(UserError, match=r"need timm, .*run `pip install timm`\.$"):
        build_model("timm:resnet18")


def test_from_the_command_line_to_a_folder_of_anybody(
    fastadv_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, timm: Any
) -> None:
    done = fastadv_command("train", "--method", "fgsm", "--model", "timm:test_resnet", *SHORT)
    assert done.code == 0, done.err
    assert 'model = "timm:test_resnet"' in Path("run/config.toml").read_text()
    again = fastadv_command("evaluate", "run", "--attacks", "clean", "--limit", 16)
    assert again.code == 0, again.err
    # A package's code is no stranger's: no --trust-code, unlike module:callable.
    shutil.copytree("run", "copy")
    model = load_model("copy")
    assert isinstance(model, timm.models.ResNet)
    saved = checkpoint.load(Path("copy/best.pt"))
    assert saved["built_for"]["image_size"] == (8, 8)
    assert torch.equal(model.get_parameter("conv1.0.weight"), saved["model"]["conv1.0.weight"])
    assert provenance.source("timm:test_resnet") == f"timm {timm.__version__}"
    monkeypatch.setattr(provenance, "library_version", lambda name: "timm 0.1")
    with pytest.warns(UserWarning, match="not what .* was trained with"):
        load_run("copy", "best")


def test_weights_of_another_network_are_refused_before_it_is_built(
    fastadv_command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, timm: Any
) -> None:
    done = fastadv_command("train", "--method", "fgsm", "--model", "timm:test_resnet", *SHORT)
    assert done.code == 0, done.err
    config, best, huge = Path("run/config.toml"), Path("run/best.pt"), "timm:vit_giant_patch14_224"
    lines = config.read_text().replace("timm:test_resnet", huge).splitlines()
    config.write_text("\n".join(line for line in lines if not line.startswith("# check")) + "\n")
    saved = checkpoint.load(best)
    saved["configuration"] = saved["configuration"].replace("timm:test_resnet", huge)
    checkpoint.save(best, saved)
    real = packaged.LIBRARIES["timm"].create
    devices = []

    def create(name: str, **options: Any) -> nn.Module:
        devices.append(torch.empty(()).device.type)
        return real(name, **options)

    monkeypatch.setitem(
        packaged.LIBRARIES, "timm", packaged.LIBRARIES["timm"]._replace(create=create)
    )
    with pytest.raises(UserError, match="belongs to another model"):
        load_model("run")
    assert set(devices) == {"meta"}
