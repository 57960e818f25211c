"""Steps with fused BatchNorm are the steps without it: recipes, networks, and what they launch."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, Architecture
from every_recipe import step_of
from test_architectures import EPS, batches
from tiny import flat_step
from tiny_staged import SAMPLES, view_of
from torch import Tensor, nn

import fastadv
from fastadv.algorithms.resolution import resolve
from fastadv.engine.model import fused_norm
from fastadv.threat import Threat
from fastadv.training.training_step import Step

SIZE, COUNT, CLASSES = 16, 6, 4
TOLERANCE = 1e-12


class Calls(Counter[str]):
    """How often each piece was called."""


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """On a CPU the pieces are plain PyTorch."""
    found = Calls()
    monkeypatch.setattr(fused_norm, "DEVICES", ("cpu",))
    monkeypatch.setattr(fused_norm, "DTYPES", (torch.float64, torch.float32, torch.bfloat16))
    for name in ("measured", "normalized", "norm_apply"):
        own = getattr(fused_norm, name)

        def counted(*args, _name=name, _own=own, **kwargs):
            found[_name] += 1
            return _own(*args, **kwargs)

        monkeypatch.setattr(fused_norm, name, counted)
    return found


def built(name: str = "preact_resnet18", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = fastadv.build_model(name, num_classes=CLASSES, **options)
    return model.double().to(memory_format=torch.channels_last)


def tiny(shortcut: str = "preact") -> nn.Module:
    return built(depths=(1, 1, 1, 1), width=4, shortcut=shortcut)


def call(step: Step, update: int, size: int = SIZE) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(update)
    x, second = torch.rand(2, COUNT, 3, size, size, generator=generator, dtype=torch.float64)
    y = torch.randint(0, CLASSES, (COUNT,), generator=generator)
    index = torch.randperm(SAMPLES, generator=generator)[:COUNT]
    more: dict[str, Any] = {"view": view_of(COUNT, update)}
    if "second_view" in step.plan.needs:
        more["second"] = second
    return step(x.to(memory_format=torch.channels_last), y, index, **more)


def trained(model: nn.Module, method: str, fused: bool, **options: Any) -> dict[str, Tensor]:
    """The state after two updates, with that of the parts."""
    torch.manual_seed(5)
    size = options.pop("size", SIZE)
    step = step_of(method, model, **options)
    step.internals.net.fused_norm = fused
    for update in range(2):
        call(step, update, size)
    step.check()
    parts = {
        f"{slot}.{name}": value
        for slot, part in step.plan.parts.items()
        for name, value in part.state.items()
    }
    return model.state_dict() | {k: v for k, v in parts.items() if isinstance(v, Tensor)}


def assert_alike(make: Any, method: str, tolerance: float = TOLERANCE, **options: Any) -> None:
    own, expected = (trained(make(), method, fused, **options) for fused in (True, False))
    for name, value in expected.items():
        scale = value.abs().max().double().clamp(min=1e-3)
        difference = (own[name].double() - value.double()).abs().max() / scale
        assert difference <= tolerance, (name, float(difference))


RECIPES: dict[str, dict[str, Any]] = {
    "pgd": {},
    "pgd-eval": {},
    "apart": {},
    "apart at the input": {"block_noise_at": "input"},
    "fgsm-plus": {},
    "trades": {},
    "trades-awp": {},
    "awp": {},
    "rwp": {},
    "advlc": {},
    "fgsm-n": {},
    "fgsm-n-advlc": {},
    "fgsm-n-gradalign": {},
    "pgd-igr": {},
    "fgsm-n-cure": {},
    "pgd-consistency": {},
    "atta-3": {},
    "free": {},
    "fgsm-n-kdsa-swa": {},
    "te": {},
    "gairat": {},
    "standard": {},
}


@pytest.mark.parametrize("shortcut", ["preact", "raw"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_every_kind_of_pass(name, shortcut, calls):
    assert_alike(lambda: tiny(shortcut), name.partition(" at ")[0], **RECIPES[name])
    assert calls["normalized"] > 0


NETWORKS: dict[str, dict[str, Any]] = {
    "preact_resnet18": {"width": 4},
    "wide_resnet28_10": {"depth": 10, "width": 1},
    "wide_resnet34_1": {"depth": 10},
    "resnet18": {"width": 4},
    "resnet50": {"width": 2},
    "densenet121": {"width": 2},
    "dla": {"width": 4},
    "vgg16": {"width": 4},
}
# The BatchNorms of projections, which are read; all others are computed together with a ReLU.
READ = {"resnet18": 3, "resnet50": 4, "dla": 6}


@pytest.mark.parametrize("name", NETWORKS)
def test_our_networks_take_the_same_step(name):
    # In the deep ones with few pixels BatchNorm amplifies rounding.
    tolerance = 1e-10 if name in ("resnet50", "dla") else TOLERANCE
    size = 32 if name in ("vgg16", "resnet50") else SIZE
    assert_alike(lambda: built(name, **NETWORKS[name]), "pgd", tolerance, size=size)


@pytest.mark.parametrize("name", ["wide_resnet28_10", "wide_resnet34_1"])
@pytest.mark.parametrize("method", ["pgd", "pgd-eval", "apart"])
def test_dropout_inside_the_blocks_takes_the_same_step(method, name):
    assert_alike(lambda: built(name, depth=10, width=1, dropout=0.2), method)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_fused_in_our_networks(name, calls):
    step = step_of("standard", built(name, **NETWORKS[name]))
    net = step.internals.net
    net.fused_norm = True
    x = torch.rand(COUNT, 3, 32, 32, dtype=torch.float64).to(memory_format=torch.channels_last)
    with net.training():
        net.logits(x)
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in net.model.modules())
    read = READ.get(name, 0)
    assert (calls["measured"], calls["normalized"], calls["norm_apply"]) == (
        norms, norms - read, read,
    )  # fmt: skip


FOREIGN = (
    *("torchvision-resnet", "torchvision-densenet", "torchvision-mobilenet_v2"),
    *("torchvision-efficientnet", "torchvision-regnet", "torchvision-shufflenet"),
    *("timm-resnet", "timm-resnext_se", "timm-efficientnet", "timm-mobilenetv4", "timm-levit"),
)


def foreign(architecture: Architecture, fused: bool) -> dict[str, Tensor]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the libraries' own
        model = architecture.build().double().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    plan = resolve("pgd", {"steps": 2, "alpha": 0.01})
    step = flat_step(model, optimizer, plan, Threat("linf", EPS), mode="eager")
    step.internals.net.fused_norm = fused
    torch.manual_seed(1)
    for x, y, start in batches(architecture):
        step(x.to(memory_format=torch.channels_last), y, start=start)
    step.check()
    return model.state_dict()


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_networks_take_the_same_step(name, calls):
    own, expected = (foreign(ARCHITECTURES[name], fused) for fused in (True, False))
    assert calls["measured"] > 0
    for key, value in expected.items():
        scale = value.abs().max().double().clamp(min=1e-2)
        difference = (own[key].double() - value.double()).abs().max() / scale
        assert difference <= 1e-9, (key, float(difference))


class SharedNorm(nn.Module):
    """One BatchNorm for three convolutions, the first two of which are in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.linear = nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x).contiguous())
        x = self.norm(self.conv(x).contiguous())
        x = self.conv(x).contiguous(memory_format=torch.channels_last)
        return self.linear(self.norm(x).relu().mean((2, 3)))


def test_buffers_that_pytorchs_norm_moves_too(calls):
    def make() -> nn.Module:
        torch.manual_seed(0)
        return SharedNorm().double().to(memory_format=torch.channels_last)

    assert_alike(make, "pgd")
    assert calls["measured"]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_a_setting_without_effect_is_told_once(layout, recwarn):
    step = step_of("fgsm", tiny().to(memory_format=layout))
    step.internals.net.fused_norm = True
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(COUNT, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    for _ in range(2):
        step(x.to(memory_format=layout), torch.arange(COUNT) % CLASSES, torch.arange(COUNT))
    told = [str(each.message) for each in recwarn if "no BatchNorm" in str(each.message)]
    assert len(told) == (layout is torch.contiguous_format)
