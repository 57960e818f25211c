"""Weights under the names of other public code load into the networks here and compute the same."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_nets
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fastadv
from fastadv.errors import UserError
from fastadv.models.foreign_names import sizes, translated

State = dict[str, Tensor]
MU = torch.tensor([0.4914, 0.4822, 0.4465], dtype=torch.float64)
SIGMA = torch.tensor([0.2471, 0.2435, 0.2616], dtype=torch.float64)


def images(size: int = 32) -> Tensor:
    return torch.rand(3, 3, size, size, dtype=torch.float64, generator=torch.manual_seed(5))


def loaded(name: str, state: State, **options: Any) -> nn.Module:
    """The network ``name`` here with the foreign ``state``, in float64."""
    own, _ = translated(name, state, "FILE")
    build = {**sizes(name, own), **options}
    if "normalize.mean" in own:
        build |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    model = fastadv.build_model(name, **build).double().eval()
    model.load_state_dict(own)
    return model


def same(model: nn.Module, x: Tensor, expected: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("depth", "widen"), [(10, 1), (16, 2)])  # 1: no projection in block1
@pytest.mark.parametrize("name", ["wide_resnet28_10", "wide_resnet32_10", "wide_resnet34_10"])
def test_wide_resnet(name: str, depth: int, widen: int) -> None:
    state = foreign_nets.wide_resnet(depth, widen)
    assert any(key.startswith("sub_block1.") for key in state)
    expected = foreign_nets.wide_resnet_logits(state, images())
    same(loaded(name, state), images(), expected)


@pytest.mark.parametrize("projects", ["raw", "preact"])
def test_preact_resnet18(projects: str) -> None:
    state = foreign_nets.preact_resnet18()
    expected = foreign_nets.preact_resnet18_logits(state, images(), projects)
    same(loaded("preact_resnet18", state, shortcut=projects), images(), expected)
    other = {"raw": "preact", "preact": "raw"}[projects]
    with pytest.raises(AssertionError):  # the names do not tell which of the two it is
        same(loaded("preact_resnet18", state, shortcut=other), images(), expected)


@pytest.mark.parametrize("torchvision", [False, True])
def test_resnet18(torchvision: bool) -> None:
    state = foreign_nets.resnet18(torchvision=torchvision)
    x = images(64 if torchvision else 32)
    same(loaded("resnet18", state), x, foreign_nets.resnet18_logits(state, x))


def wrapped(state: State, mean: Tensor, std: Tensor, form: str) -> State:
    """``state`` of a network that scales its input in one of the published ways."""
    if form == "buffers":  # RobustBench: registered in the network
        return {**state, "mu": mean.view(1, 3, 1, 1), "sigma": std.view(1, 3, 1, 1)}
    if form == "named":  # RobustBench's normalize_model
        inner = {f"model.{key}": value for key, value in state.items()}
        shape = (1, 3, 1, 1)
        return {"normalize.mean": mean.view(shape), "normalize.std": std.view(shape), **inner}
    if form == "inside":  # a LightningModule around RobustBench's network
        inner = wrapped(state, mean, std, "buffers")
        return {f"net.model.{key}": value for key, value in inner.items()}
    inner = {f"1.{key}": value for key, value in state.items()}  # advertorch's layer
    return {"0.mean": mean, "0.std": std, **inner}


@pytest.mark.parametrize("form", ["buffers", "named", "sequential", "inside"])
def test_a_network_that_scales_its_input(form: str) -> None:
    state = foreign_nets.wide_resnet(10, 1, sub_block1=False)
    x = images()
    scaled = (x - MU.view(1, 3, 1, 1)) / SIGMA.view(1, 3, 1, 1)
    expected = foreign_nets.wide_resnet_logits(state, scaled)
    same(loaded("wide_resnet28_10", wrapped(state, MU, SIGMA, form)), x, expected)


def test_names_of_ours_stay() -> None:
    for name in ("wide_resnet28_10", "preact_resnet18", "resnet18", "resnet50", "vgg16"):
        options = {"depth": 10, "width": 1} if "wide" in name else {"width": 2}
        state = fastadv.build_model(name, **options, mean=[0.5] * 3).state_dict()
        own, renamed = translated(name, state, "FILE")
        assert own.keys() == state.keys()
        assert not renamed


NETWORKS: dict[str, tuple[Callable[[], State], str]] = {
    "wide": (lambda: foreign_nets.wide_resnet(10, 1), "wide_resnet34_10"),
    "preact": (lambda: foreign_nets.preact_resnet18(2), "preact_resnet18"),
}


def logits(kind: str, state: State, x: Tensor) -> Tensor:
    if kind == "wide":
        return foreign_nets.wide_resnet_logits(state, x)
    return foreign_nets.preact_resnet18_logits(state, x, "preact")


@pytest.mark.parametrize("key", [None, "state_dict", "model", "net", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod."])
def test_forms_of_a_file(key: str | None, prefix: str, tmp_path: Path) -> None:
    state = {prefix + name: value for name, value in NETWORKS["preact"][0]().items()}
    content = state if key is None else {key: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    file = tmp_path / "weights.pt"
    torch.save(content, file, _use_new_zipfile_serialization=key != "net")
    model = fastadv.load_model(str(file), model="preact_resnet18").double()
    same_in_float32(model, "preact", NETWORKS["preact"][0]())


def same_in_float32(model: nn.Module, kind: str, state: State) -> None:
    rounded = {
        name: v.float().double() if v.is_floating_point() else v for name, v in state.items()
    }
    same(model, images(), logits(kind, rounded, images()))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_safetensors_file_of_half_precision(kind: str, tmp_path: Path) -> None:
    make, name = NETWORKS[kind]
    state = {n: v.half() if v.is_floating_point() else v for n, v in make().items()}
    save_file(state, tmp_path / "weights.safetensors")
    model = fastadv.load_model(tmp_path / "weights.safetensors", model=name)  # a path object too
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    same_in_float32(model.double(), kind, state)


def test_old_files_without_counters(tmp_path: Path) -> None:
    state = {n: v for n, v in NETWORKS["preact"][0]().items() if "num_batches" not in n}
    torch.save(state, tmp_path / "weights.pt")
    model = fastadv.load_model(str(tmp_path / "weights.pt"), model="preact_resnet18").double()
    same_in_float32(model, "preact", state)


class Runs:
    """Pickled, this would call ``print``."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("code in a weights file has run",)


def changed(name: str, value: Tensor) -> State:
    state = NETWORKS["preact"][0]()
    assert name in state
    return {**state, name: value}


def without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


BAD: dict[str, tuple[Any, str, str]] = {
    "another network": (
        NETWORKS["wide"][0],
        "preact_resnet18",
        "does not fit preact_resnet18: it lacks 'layer1.0.bn1.weight' .*'block1.layer.0.bn1.weight",
    ),
    "a part of it": (
        lambda: without(NETWORKS["preact"][0](), "layer3.1.bn2.bias"),
        "preact_resnet18",
        r"it lacks 'layer3.1.bn2.bias' \(1 in all\); name the network",
    ),
    "more than it": (
        lambda: {**NETWORKS["preact"][0](), "extra.weight": torch.zeros(2)},
        "preact_resnet18",
        r"it has 'extra.weight' \(1 in all\) too many",
    ),
    "another shape": (
        lambda: changed("layer2.0.bn1.bias", torch.zeros(3)),
        "preact_resnet18",
        r"its layer2.0.bn1.bias has shape \(3,\), not \(2,\)",
    ),
    "NaN": (
        lambda: changed("layer2.0.bn1.bias", torch.full((2,), torch.nan)),
        "preact_resnet18",
        "its layer2.0.bn1.bias holds values that are NaN",
    ),
    "infinite": (
        lambda: changed("layer2.0.bn1.running_var", torch.tensor([1.0, torch.inf])),
        "preact_resnet18",
        "NaN or infinite",
    ),
    "whole numbers": (
        lambda: changed("layer2.0.bn1.bias", torch.zeros(2, dtype=torch.int8)),
        "preact_resnet18",
        "no plain tensor of numbers",
    ),
    "no last BatchNorm": (
        lambda: foreign_nets.preact_resnet18(2, last_norm=False),
        "preact_resnet18",
        "has no BatchNorm before its last layer",
    ),
    "no last bias": (
        lambda: without(NETWORKS["wide"][0](), "fc.bias"),
        "wide_resnet34_10",
        "has no bias in its last layer",
    ),
    "other activations": (
        lambda: {"init_conv.weight": torch.zeros(16, 3, 3, 3), "logits.bias": torch.zeros(10)},
        "wide_resnet28_10",
        "with other activations: name its own code",
    ),
    "two names for one": (
        lambda: {**NETWORKS["wide"][0](), "bn.weight": torch.zeros(64)},
        "wide_resnet28_10",
        "two tensors that would be 'bn.weight'",
    ),
    "one name twice": (
        lambda: {"a": torch.zeros(1), "module.a": torch.zeros(1)},
        "preact_resnet18",
        "holds 'a' twice",
    ),
    "code": (
        lambda: {"state_dict": NETWORKS["preact"][0](), "best": Runs()},
        "preact_resnet18",
        "names code, .*print, which is not run",
    ),
    "settings": (
        lambda: {"state_dict": {}, "args": argparse.Namespace(lr=0.1)},
        "preact_resnet18",
        "names code, argparse.Namespace, which is not run",
    ),
    "a whole model": (lambda: nn.Linear(2, 2), "preact_resnet18", "names code, torch.nn"),
    "no weights": (
        lambda: {"epoch": 3, "lr": 0.1},
        "preact_resnet18",
        r"holds no weights, .*\(it holds epoch, lr\)",
    ),
}


@pytest.mark.parametrize("why", BAD)
def test_a_file_that_is_refused(why: str, tmp_path: Path, capfd: Any) -> None:
    make, name, sentence = BAD[why]
    torch.save(make(), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=sentence) as refused:
        fastadv.load_model(str(tmp_path / "weights.pt"), model=name)
    assert "\n" not in str(refused.value)
    assert "code in a weights file has run" not in capfd.readouterr().out


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 no archive")
    (tmp_path / "damaged.safetensors").write_bytes(b"\xff" * 40)
    for name, sentence in [
        ("missing.pt", "There is no file"),
        ("damaged.pt", "damaged or no file of torch.save"),
        ("damaged.safetensors", "damaged or no safetensors file"),
        (".", "not a regular file"),
    ]:
        with pytest.raises(UserError, match=sentence):
            fastadv.load_model(str(tmp_path / name), model="preact_resnet18")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("suffix", "runs_it"), [(".pt2", "torch.export"), (".onnx", "ONNX")])
def test_a_program_of_export_holds_no_weights(suffix: str, runs_it: str, tmp_path: Path) -> None:
    file = tmp_path / f"net{suffix}"
    file.write_bytes(b"any")
    for options in ({}, {"model": "preact_resnet18"}):
        with pytest.raises(UserError, match=rf"for (an )?{runs_it}.*to a \.safetensors file"):
            fastadv.load_model(str(file), **options)
    file.unlink()
    with pytest.raises(UserError, match="There is no"):
        fastadv.load_model(str(file))


def test_a_program_is_not_run(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.rand(1, 2)), tmp_path / "program.pt")
    with pytest.raises(UserError, match="is a TorchScript program"):
        fastadv.load_model(str(tmp_path / "program.pt"), model="preact_resnet18")


def test_classes_and_channels_must_be_those_of_the_tensors(tmp_path: Path) -> None:
    torch.save(NETWORKS["wide"][0](), tmp_path / "weights.pt")
    call = {"path": str(tmp_path / "weights.pt"), "model": "wide_resnet28_10"}
    with pytest.raises(UserError, match="is of a network for 10 classes, and the call has 100"):
        fastadv.load_model(**call, num_classes=100)
    with pytest.raises(UserError, match="is of a network for 3 channels, and the call has 1"):
        fastadv.load_model(**call, in_channels=1)


def test_two_scalings_are_refused(tmp_path: Path) -> None:
    torch.save(wrapped(NETWORKS["wide"][0](), MU, SIGMA, "buffers"), tmp_path / "weights.pt")
    with pytest.raises(UserError, match="has its own mean and deviation"):
        fastadv.load_model(
            str(tmp_path / "weights.pt"), model="wide_resnet28_10", mean=[0.5] * 3, std=[0.5] * 3
        )


def test_a_hostile_note_takes_no_memory(tmp_path: Path) -> None:
    """Notes of an export say the width of a network whose tensors do not."""
    state = {"linear.weight": torch.zeros(10, 8), "linear.bias": torch.zeros(10)}
    for width, sentence in [("60000", "does not fit vgg16"), ("9" * 40, "no network has")]:
        notes = {"model": "vgg16", "width": width, "num_classes": "10", "in_channels": "3"}
        save_file(state, tmp_path / "w.safetensors", metadata=notes)
        with pytest.raises(UserError, match=sentence):
            fastadv.load_model(str(tmp_path / "w.safetensors"))
    notes = {"model": "os:system", "num_classes": "10", "in_channels": "3"}
    save_file(state, tmp_path / "w.safetensors", metadata=notes)
    with pytest.raises(UserError, match=re.escape("names code to run, model os:system")):
        fastadv.load_model(str(tmp_path / "w.safetensors"))
