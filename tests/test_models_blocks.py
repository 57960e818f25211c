"""Which convolutions APART perturbs, and reaching the network inside its wrappers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastadv.engine.torchvision_shim import import_torchvision
from fastadv.errors import UserError
from fastadv.models import build_model
from fastadv.models.blocks import perturbable_blocks
from fastadv.models.wrapped import inner_module


def names(model: nn.Module, chosen: str | list[str] | None = None) -> list[str]:
    return [name for name, _ in perturbable_blocks(model, chosen)]


@pytest.mark.parametrize(
    ("model", "blocks"),
    [
        ("preact_resnet18", 8),
        ("resnet18", 8),
        ("resnet50", 16),
        ("wide_resnet28_10", 12),
        ("wide_resnet32_10", 15),
        ("wide_resnet34_10", 15),
        ("wide_resnet34_1", 15),
        ("dla", 14),
        ("densenet121", 58),
    ],
)
def test_every_residual_block_is_found(model: str, blocks: int) -> None:
    with torch.device("meta"):
        found = perturbable_blocks(build_model(model))
    assert len(found) == blocks
    assert all(isinstance(module, nn.Conv2d) for _, module in found)


def test_the_stem_is_not_a_block_and_the_order_is_the_models() -> None:
    with torch.device("meta"):
        model = build_model("preact_resnet18")
    expected = [f"layer{k}.{i}.conv1" for k in (1, 2, 3, 4) for i in (0, 1)]
    assert names(model) == expected
    assert all(module is model.get_submodule(n) for n, module in perturbable_blocks(model))


@pytest.mark.parametrize("shortcut", ["raw", "preact"])
def test_the_perturbed_tensor_is_relu_bn1_and_leaves_the_shortcut_alone(shortcut: str) -> None:
    torch.manual_seed(0)
    model = build_model("preact_resnet18", width=4, shortcut=shortcut).double().eval()
    entering: dict[str, Tensor] = {}
    module = dict(perturbable_blocks(model))["layer2.0.conv1"]
    block = model.get_submodule("layer2.0")
    x = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    clean = block(x)

    def shift(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        entering["h"] = args[0]
        return (args[0] + 0.1,)

    module.register_forward_pre_hook(shift)
    shifted = block(x)
    h = F.relu(block.get_submodule("bn1")(x))
    assert torch.equal(entering["h"], h)
    skip = block.get_submodule("shortcut")(x if shortcut == "raw" else h)
    bn2, conv2 = block.get_submodule("bn2"), block.get_submodule("conv2")
    kernel = module.get_parameter("weight")
    through = conv2(F.relu(bn2(F.conv2d(h + 0.1, kernel, stride=2, padding=1))))
    torch.testing.assert_close(shifted, through + skip)
    assert not torch.allclose(shifted, clean)


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", 8), ("resnet50", 16)])
def test_torchvisions_resnets_are_recognised(name: str, blocks: int) -> None:
    with torch.device("meta"):
        model = getattr(import_torchvision().models, name)()
    found = names(model)
    assert len(found) == blocks
    assert found[0] == "layer1.0.conv1"


class Foreign(nn.Module):
    """A network whose blocks have unusual names, around a small complete network."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            nn.ModuleDict({"first": nn.Conv2d(3, 3, 1), "second": nn.Conv2d(3, 3, 1)})
            for _ in range(11)
        )
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.fc = nn.Linear(3, 2)


def test_a_custom_network_by_module_names() -> None:
    model = Foreign()
    assert names(model, ["body.3.first", "body.0.first"]) == ["body.0.first", "body.3.first"]
    assert names(model, "body.*.first") == [f"body.{i}.first" for i in range(11)]
    assert names(model, ["body.1.*", "body.1.first"]) == ["body.1.first", "body.1.second"]
    assert names(model, ["body.2"]) == ["body.2"]  # a full name takes any module
    assert names(model, "h*") == ["head.1"]
    assert names(model, "*")[-1] == "head.1"


def test_names_override_what_would_be_recognised() -> None:
    with torch.device("meta"):
        model = build_model("resnet18")
    assert names(model, ["layer4.*.conv2"]) == ["layer4.0.conv2", "layer4.1.conv2"]


@pytest.mark.parametrize("model", [Foreign(), SmallNet(), nn.Sequential(SmallNet()), nn.Identity()])
def test_a_network_without_recognised_blocks_is_refused_with_the_way_out(model: nn.Module) -> None:
    with pytest.raises(UserError, match=r"name the modules .*fgsm-plus"):
        perturbable_blocks(model)


def test_plain_vgg_has_no_blocks() -> None:
    with torch.device("meta"):
        model = build_model("vgg16")
    with pytest.raises(UserError, match="no residual blocks"):
        perturbable_blocks(model)
    assert names(model, ["features.7"]) == ["features.7"]


@pytest.mark.parametrize("bad", ["layer9.*", ["layer1.0.conv1", "layer1.0.conv7"], ["body"], ""])
def test_a_name_that_matches_nothing(bad: str | list[str]) -> None:
    with torch.device("meta"):
        model = build_model("resnet18")
    with pytest.raises(UserError, match=r"Unknown module of ResNet .*(did you mean|among the)"):
        perturbable_blocks(model, bad)


def test_an_empty_list_of_names() -> None:
    with pytest.raises(UserError, match="empty"):
        perturbable_blocks(Foreign(), [])


def test_inside_torch_compile_names_are_the_networks_own() -> None:
    model = build_model("preact_resnet18", width=2)
    compiled = torch.compile(model, backend="aot_eager")
    assert inner_module(compiled) is model
    assert names(compiled) == names(model)
    assert inner_module(model) is model


def test_inside_ddp(tmp_path: object) -> None:
    model = build_model("preact_resnet18", width=2)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")
        assert inner_module(wrapped) is model
        assert names(wrapped) == names(model)
    finally:
        torch.distributed.destroy_process_group()


def test_dataparallel_is_refused() -> None:
    with pytest.raises(UserError, match="DistributedDataParallel"):
        inner_module(nn.DataParallel(SmallNet()))
