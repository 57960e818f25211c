"""Layer groups: every parameter in exactly one, as the papers and their code cut the networks."""

import re
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError
from fastadv.models import MODELS, build_model
from fastadv.models.stages import stage_parameters, stages


def meta(name: str, **options: Any) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, **options)


@pytest.mark.parametrize("split", ["stages", "quarters"])
@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_in_exactly_one_group(name: str, split: str) -> None:
    model = meta(name, mean=(0.5,) * 3)
    listed = [parameter for group in stages(model, split).values() for parameter in group]
    assert sorted(listed) == sorted(parameter for parameter, _ in model.named_parameters())


@pytest.mark.parametrize("name", ["preact_resnet18", "resnet18", "resnet50"])
def test_residual_stages_hold_convs_and_bn_and_leave_stem_and_classifier(name: str) -> None:
    model = meta(name)
    groups = stages(model)
    assert list(groups) == ["1", "2", "3", "4", "rest"]
    for k in "1234":
        inside = {f"layer{k}.{p}" for p, _ in model.get_submodule(f"layer{k}").named_parameters()}
        assert set(groups[k]) == inside
    assert groups["rest"][0] == "conv1.weight"
    assert set(groups["rest"][1:]) == {"bn.weight", "bn.bias", "linear.weight", "linear.bias"}


@pytest.mark.parametrize("name", ["wide_resnet34_10", "wide_resnet34_1"])
def test_wide_resnet_has_three_stages(name: str) -> None:
    groups = stages(meta(name))
    assert list(groups) == ["1", "2", "3", "rest"]
    assert all(name.startswith(f"block{k}.") for k in "123" for name in groups[k])


def test_quarters_of_wrn34_are_the_published_lists() -> None:
    model = meta("wide_resnet34_10")
    groups = stages(model, "quarters")
    order = [name for name, _ in model.named_parameters()]
    # Where RAT's authors cut: each group's first tensor in their lists.
    first = ["conv1.weight", "block1.3.conv2.weight", "block2.2.conv2.weight"]
    first.append("block3.1.conv1.weight")
    cuts = [order.index(name) for name in first] + [len(order)]
    assert [b - a for a, b in pairwise(cuts)] == [25, 25, 22, 26]
    for k, (start, stop) in enumerate(pairwise(cuts), 1):
        assert groups[str(k)] == order[start:stop]
    assert groups["rest"] == []
    assert {"bn.weight", "linear.weight", "linear.bias"} <= set(groups["4"])


def test_vgg_layers_are_the_published_ranges_of_convolutions() -> None:
    model = meta("vgg16")
    groups = stages(model)
    convolutions = {
        k: [int(m[1]) for name in groups[k] if (m := re.match(r"features\.(\d+)\.weight", name))]
        for k in "1234"
    }
    conv_only = {
        k: [i for i in found if isinstance(model.get_submodule(f"features.{i}"), nn.Conv2d)]
        for k, found in convolutions.items()
    }
    assert conv_only == {
        "1": [0, 3, 7],
        "2": [10, 14, 17],
        "3": [20, 24, 27, 30],
        "4": [34, 37, 40],
    }
    for k, indices in conv_only.items():  # each with its bias and its BN
        own = {f"features.{i + j}.{p}" for i in indices for j in (0, 1) for p in ("weight", "bias")}
        assert set(groups[k]) == own
    assert groups["rest"] == ["linear.weight", "linear.bias"]


def test_dla_and_densenet() -> None:
    groups = stages(meta("dla"))
    for k in "1234":
        assert {name.split(".")[0] for name in groups[k]} == {f"layer{int(k) + 2}"}
    assert {name.split(".")[0] for name in groups["rest"]} == {"base", "layer1", "layer2", "linear"}
    dense = stages(meta("densenet121"))
    assert {name.split(".")[0] for name in dense["2"]} == {"dense2", "trans2"}
    assert {name.split(".")[0] for name in dense["rest"]} == {"conv1", "bn", "linear"}


def test_torchvisions_resnet_and_compiled_models_keep_bare_names() -> None:
    with torch.device("meta"):
        theirs = import_torchvision().models.resnet18()
    assert len(stages(theirs)["3"]) == 15
    model = build_model("preact_resnet18", width=2)
    assert stages(torch.compile(model, backend="aot_eager")) == stages(model)


class Mine(nn.Module):
    stage_prefixes: ClassVar = (("early",), ("late", "later"))

    def __init__(self) -> None:
        super().__init__()
        self.early, self.earlyish = nn.Linear(2, 2), nn.Linear(2, 2)
        self.late, self.later = nn.Linear(2, 2), nn.Linear(2, 2)


def test_a_custom_network_declares_its_stages() -> None:
    groups = stages(Mine())
    assert groups["1"] == ["early.weight", "early.bias"]
    assert groups["2"] == ["late.weight", "late.bias", "later.weight", "later.bias"]
    assert groups["rest"] == ["earlyish.weight", "earlyish.bias"]


def test_selection_keeps_the_models_order() -> None:
    model = meta("preact_resnet18")
    groups = stages(model)
    assert stage_parameters(model, ["4", 3]) == groups["3"] + groups["4"]
    assert stage_parameters(model, ["rest"]) == groups["rest"]


class Unknown(nn.Module):
    """Without stages that could be recognised."""

    def __init__(self) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(2))
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(11))
        self.fc = nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (["fc"], ["fc.weight"]),
        (["blocks.1"], ["blocks.1.weight", "blocks.1.bias"]),  # not blocks.10
        (["fc", "pos_embed"], ["pos_embed", "fc.weight"]),
        (["blocks.1*.weight"], ["blocks.1.weight", "blocks.10.weight"]),
        (["blocks.1*"], [f"blocks.{i}.{p}" for i in (1, 10) for p in ("weight", "bias")]),
        (["blocks"], [f"blocks.{i}.{p}" for i in range(11) for p in ("weight", "bias")]),
    ],
)
def test_modules_are_selected_by_name(selection: list[str], expected: list[str]) -> None:
    assert stage_parameters(Unknown(), selection) == expected


def test_names_and_numbers_go_together_and_numbers_are_always_groups() -> None:
    model = meta("preact_resnet18")
    groups = stages(model)
    both = stage_parameters(model, ["4", "layer3", "linear.bias"])
    assert both == [*groups["3"], *groups["4"], "linear.bias"]
    numbered = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    with pytest.raises(UserError, match=r"are not known; name modules .* such as '4'"):
        stage_parameters(numbered, ["3", "4"])


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("layr4", "did you mean 'layer4'"),
        ("layer4.0.conv7", "did you mean 'layer4.0.conv"),
        ("zz*", "known are normalize, conv1, layer1"),
        ("", "known are normalize"),
    ],
)
def test_a_misspelt_module_names_the_nearest(entry: str, says: str) -> None:
    with pytest.raises(UserError, match=f"Unknown module or parameter of PreActResNet .*{says}"):
        stage_parameters(meta("preact_resnet18"), ["4", entry])


def test_selections_that_match_nothing_are_errors() -> None:
    model = meta("wide_resnet28_10")
    with pytest.raises(UserError, match=r"Unknown layer group '4'.*split=quarters"):
        stage_parameters(model, [3, 4])
    with pytest.raises(UserError, match="matches no parameter"):
        stage_parameters(model, [])
    with pytest.raises(UserError, match="matches no parameter"):
        stage_parameters(model, ["rest"], split="quarters")
    with pytest.raises(UserError, match="Unknown split"):
        stages(model, "halves")


class Wrong(Mine):
    stage_prefixes: ClassVar = (("early",), ("missing",))


class Twice(Mine):
    stage_prefixes: ClassVar = (("early",), ("late", "early"))


def test_wrong_stages_are_errors() -> None:
    with pytest.raises(UserError, match="Layer group 2 of Wrong holds no parameters"):
        stages(Wrong())
    with pytest.raises(UserError, match=r"early.weight belongs to layer groups 1 and 2"):
        stages(Twice())
    with pytest.raises(UserError, match="stages of Linear are not known"):
        stages(nn.Linear(2, 2))
    with pytest.raises(UserError, match="holds no parameters"):
        stages(nn.Linear(2, 2), "quarters")
