"""A user's own network through ``module:callable``."""

import copy
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastadv.errors import UserError
from fastadv.models import build_model
from fastadv.models.blocks import perturbable_blocks

SOURCE = """
    import torch
    from torch import nn

    class Net(nn.Module):
        def __init__(self, num_classes, in_channels=3, hidden=4):
            super().__init__()
            self.conv = nn.Conv2d(in_channels, hidden, 3)
            self.fc = nn.Linear(hidden, num_classes)
        def forward(self, x):
            return self.fc(self.conv(x).relu().mean((2, 3)))

    class Scaled(Net):
        def normalize(self, x):
            return x

    def fixed():
        return Net(10)

    def forwards(**kwargs):
        return Net(**kwargs)

    def broken(num_classes):
        return len(3)

    def needs(num_classes, path):
        return Net(num_classes)

    def number(num_classes):
        return num_classes

    def layers(num_classes):
        pooled = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes)
        same = nn.ReLU()
        return nn.Sequential(nn.Conv2d(3, 4, 3), same, nn.Conv2d(4, 4, 3), same, *pooled)

    class Own(nn.Sequential):
        def __init__(self, num_classes):
            super().__init__(*layers(num_classes))
        def forward(self, x):
            return super().forward(x) * 2

    class EveryChild(nn.Module):
        def __init__(self, num_classes):
            super().__init__()
            for name, layer in layers(num_classes).named_children():
                self.add_module("layer" + name, layer)
        def forward(self, x):
            for layer in self.children():
                x = layer(x)
            return x

    constant = 3
    wide = lambda num_classes, width=1, dropout=0.0: Net(num_classes, hidden=width)
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module in the current directory, not on the path: how the command line is used."""
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.setattr("sys.path", ["/nowhere"] + [p for p in sys.path if p])
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_class_receives_the_datas_properties_and_its_own_options(mine: str) -> None:
    model = build_model(f"{mine}:Net", num_classes=7, in_channels=2, hidden=5)
    assert model(torch.rand(3, 2, 8, 8)).shape == (3, 7)
    assert model.get_submodule("conv").weight.shape[0] == 5


def test_callables_with_fewer_or_arbitrary_arguments(mine: str) -> None:
    assert build_model(f"{mine}:fixed", num_classes=7)(torch.rand(1, 3, 8, 8)).shape == (1, 10)
    assert build_model(f"{mine}:forwards", num_classes=7)(torch.rand(1, 3, 8, 8)).shape == (1, 7)
    assert build_model(f"{mine}:wide", width=6, dropout=0.5).get_submodule("fc").in_features == 6


def test_normalisation_comes_first_and_names_stay(mine: str) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    torch.manual_seed(0)
    model = build_model(f"{mine}:Net", mean=mean, std=std)
    plain = build_model(f"{mine}:Net")
    parameters = [name for name, _ in model.named_parameters()]
    assert parameters == [name for name, _ in plain.named_parameters()]
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "normalize" not in k})
    x = torch.rand(2, 3, 8, 8)
    expected = plain((x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1))
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    assert model.get_buffer("normalize.mean").shape == (1, 3, 1, 1)
    with torch.device("meta"):  # as where a file is compared with it
        unfilled = build_model(f"{mine}:Net", mean=mean, std=std)
    assert unfilled.state_dict().keys() == model.state_dict().keys()


def test_normalisation_is_the_first_layer_of_a_sequential(mine: str) -> None:
    torch.manual_seed(0)
    model = build_model(f"{mine}:layers", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    plain = build_model(f"{mine}:layers")
    state = {k: v for k, v in model.state_dict().items() if "normalize" not in k}
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    x = torch.rand(2, 3, 8, 8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.2, 0.3, 0.4])
    expected = plain((x - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model)(x), expected, rtol=0, atol=0)
    twin = build_model(f"{mine}:layers", mean=(0.0,) * 3, std=(1.0,) * 3)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("network", ["Own", "EveryChild"])
def test_a_network_that_calls_every_layer_is_not_normalised_twice(mine: str, network: str) -> None:
    x = torch.rand(2, 3, 8, 8)
    assert build_model(f"{mine}:{network}")(x).shape == (2, 10)
    model = build_model(f"{mine}:{network}", mean=(0.5,) * 3)
    with pytest.raises(UserError, match=f"{network} calls every layer it has.*--no-normalize"):
        model(x)


def test_torchvisions_own_resnet_by_name() -> None:
    model = build_model("torchvision.models:resnet18", num_classes=4, mean=(0.5,) * 3)
    assert model.get_submodule("fc").out_features == 4
    assert len(perturbable_blocks(model)) == 8


@pytest.mark.parametrize(
    ("callable_name", "options", "says"),
    [
        ("Nett", {}, "did you mean 'Net'"),
        ("constant", {}, "is a int, not a callable"),
        ("number", {}, "returned a int, not a torch.nn.Module"),
        ("Net", {"hiden": 3}, "did you mean 'hidden'"),
        ("Net", {"width": 3}, "Unknown option of model"),
        ("Net", {"dropout": 0.1}, "Unknown option of model"),
        ("fixed", {"width": 3}, "takes no options"),
        ("forwards", {"hiden": 3}, "unexpected keyword argument 'hiden'"),
        ("needs", {}, "missing 1 required positional argument: 'path'"),
        ("Scaled", {"mean": (0.5,) * 3}, "already has an attribute 'normalize'"),
        ("", {}, "module:callable"),
        ("Net.x", {}, "module:callable"),
    ],
)
def test_impossible_requests_are_refused(
    mine: str, callable_name: str, options: dict, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        build_model(f"{mine}:{callable_name}", **options)


def test_modules_that_cannot_be_imported(mine: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Cannot import 'no_such_module_anywhere'"):
        build_model("no_such_module_anywhere:Net")
    (tmp_path / "lacking.py").write_text("import no_such_dependency")
    with pytest.raises(UserError, match="no_such_dependency"):
        build_model("lacking:Net")


def test_a_mistake_inside_the_callable_keeps_its_traceback(mine: str) -> None:
    with pytest.raises(TypeError, match="no len") as caught:
        build_model(f"{mine}:broken")
    assert not isinstance(caught.value, UserError)
    assert caught.traceback[-1].name == "broken"
