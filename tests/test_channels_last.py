"""Kernels in channels_last for a while: the same network, and afterwards the same tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastadv
from fastadv.engine.model.channels_last import kernels_channels_last
from fastadv.errors import UserError


class Own(nn.Conv2d):
    """A convolution that may do anything with its kernel."""


def network() -> nn.Sequential:
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), shared, nn.ReLU(), shared, Own(4, 4, 3),
        nn.Conv2d(4, 6, 1), nn.Flatten(), nn.Linear(96, 5),
    )  # fmt: skip


def test_kernels_are_copies_with_the_same_values_and_come_back() -> None:
    model = network()
    x = torch.rand(7, 1, 6, 6)
    expected = model(x).detach()
    before = [module._parameters.get("weight") for module in model]
    layers = list(model)
    with kernels_channels_last(model):
        kernels = [module._parameters.get("weight") for module in model]
        changed = [a is not b for a, b in zip(kernels, before, strict=True)]
        # Only plain convolutions with several channels and a window.
        assert [index for index, is_new in enumerate(changed) if is_new] == [2, 4]
        assert kernels[2] is kernels[4]
        assert kernels[2].is_contiguous(memory_format=torch.channels_last)
        assert not kernels[2].requires_grad
        torch.testing.assert_close(model(x).detach(), expected)
    after = [module._parameters.get("weight") for module in layers]
    assert all(a is b for a, b in zip(after, before, strict=True))


def test_other_types_and_layouts_stay() -> None:
    for model in (network().double(), network().to(memory_format=torch.channels_last)):
        before = [id(parameter) for parameter in model.parameters()]
        with kernels_channels_last(model):
            assert [id(parameter) for parameter in model.parameters()] == before


def test_kernels_come_back_after_an_error() -> None:
    model = network()
    before = [id(parameter) for parameter in model.parameters()]
    try:
        with kernels_channels_last(model):
            raise KeyError
    except KeyError:
        pass
    assert [id(parameter) for parameter in model.parameters()] == before


def test_an_evaluation_uses_them_and_leaves_the_model_as_it_was() -> None:
    model = network()
    x = torch.rand(9, 1, 6, 6)
    y = model(x).argmax(1)
    seen = []
    model[2].register_forward_hook(
        lambda module, *_: seen.append(
            module.weight.is_contiguous(memory_format=torch.channels_last)
        )
    )
    kernel = model[2].weight
    for name in ("pgd-2", "apgd-ce-2"):
        fastadv.evaluate(model, [(x, y)], [name], eps=0.01)
        fastadv.attack(model, x, y, name, eps=0.01)
    assert seen
    assert all(seen)
    assert model[2].weight is kernel
    assert kernel.requires_grad


def test_an_evaluation_in_inference_mode_is_that_outside_of_it() -> None:
    model = network()
    x = torch.rand(9, 1, 6, 6)
    y = model(x).argmax(1)
    expected = fastadv.attack(model, x, y, "pgd-2", eps=0.1)
    scores = fastadv.evaluate(model, [(x, y)], ["apgd-ce-2"], eps=0.1)
    with torch.inference_mode():
        assert torch.equal(fastadv.attack(model, x, y, "pgd-2", eps=0.1), expected)
        assert fastadv.evaluate(model, [(x, y)], ["apgd-ce-2"], eps=0.1) == scores


class InOneMode(nn.Sequential):
    def train(self, mode: bool = True) -> nn.Module:
        raise NotImplementedError


def test_kernels_come_back_if_the_model_cannot_be_attacked() -> None:
    model = InOneMode(*network())
    before = [id(parameter) for parameter in model.parameters()]
    batch = (torch.rand(3, 1, 6, 6), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(UserError, match="cannot change between training and evaluation") as error:
        fastadv.evaluate(model, [batch], ["clean"])
    assert error  # and with it all that was under way
    assert [id(parameter) for parameter in model.parameters()] == before
