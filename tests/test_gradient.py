"""Leaves, with respect to which gradients are taken, eager and inside a graph."""

from pathlib import Path

import pytest
import torch

import fastadv
from fastadv.engine.gradient import differentiable_gradient, input_gradient, leaf

PACKAGE = Path(fastadv.__file__).parent
# Where regions are written: what they do must trace on every torch we take.
REGIONS = ("algorithms", "training/update.py", "training/regions.py")


def cube(x):
    x = leaf(x * 2.0)
    return input_gradient(x.pow(3).sum(), x)


def slope_of_a_gradient(x, weight):
    x = leaf(x)
    found = differentiable_gradient((x * weight).pow(2).sum(), x)
    return torch.autograd.grad(found.sum(), weight)[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_taken_with_respect_to_a_leaf(compiled):
    x = torch.tensor([1.0, -2.0], dtype=torch.float64)
    weight = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    regions = [cube, slope_of_a_gradient]
    if compiled:
        regions = [torch.compile(each, backend="aot_eager", fullgraph=True) for each in regions]
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        # d(2x)^3/d(2x), and d/dw sum(2 w^2 x).
        torch.testing.assert_close(regions[0](x), 3 * (2 * x) ** 2)
        torch.testing.assert_close(regions[1](x, weight), (4 * weight * x).sum().detach())


def test_nothing_flows_back_through_a_leaf():
    x = torch.ones(2, requires_grad=True)
    assert torch.autograd.grad(leaf(x).sum() + x.sum(), x)[0].tolist() == [1.0, 1.0]


def test_regions_make_leaves_in_one_place_only():
    found = [
        file.name
        for place in REGIONS
        for file in sorted((PACKAGE / place).rglob("*.py")) or [PACKAGE / place]
        if ".requires_grad_()" in file.read_text()
    ]
    assert not found
