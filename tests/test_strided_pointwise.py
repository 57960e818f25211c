"""Strided 1x1 convolutions that oneDNN's weight gradient breaks on a CPU are never called."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from bench_script import BENCH
from functorch.compile import make_boxed_func
from tiny import flat_step
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode

from fastadv.algorithms.resolution import resolve
from fastadv.engine.model.strided_pointwise import pointwise, strides_taken_first
from fastadv.threat import Threat

CPU = torch.device("cpu")
SLOW = pytest.mark.slow


class Backwards(TorchDispatchMode):
    """Collects the weights and strides of all convolutions whose gradients are computed."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default and args[10][1]:
            self.found.append((tuple(args[2].shape), args[4], args[2].dtype))
        return func(*args, **(kwargs or {}))


def collecting(found):
    """A compiler backend that collects the same from every graph, and runs it uncompiled."""

    def look(graph, inputs):
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten.convolution_backward.default and node.args[10][1]:
                weight = node.args[2].meta["val"]
                found.append((tuple(weight.shape), node.args[4], weight.dtype))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=look)


def dangerous(found):
    return [
        (shape, stride)
        for shape, stride, dtype in found
        if dtype == torch.float32 and shape[2:] == (1, 1) and 1 < shape[1] < 16 and max(stride) > 1
    ]


class Functional(nn.Module):
    """The same convolution without a module for it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(16, 8, 1, 1))

    def forward(self, x):
        return functional.conv2d(x, self.weight, stride=2)


class Standardised(nn.Conv2d):
    """A convolution with its own forward, as Big Transfer's networks have."""

    def forward(self, x):
        weight = self.weight - self.weight.mean()
        return functional.conv2d(x, weight, self.bias, self.stride, self.padding)


KINDS = {
    "a module": lambda: nn.Conv2d(8, 16, 1, stride=2),
    "unequal strides": lambda: nn.Conv2d(8, 16, 1, stride=(1, 2), bias=False),
    "valid padding": lambda: nn.Conv2d(8, 16, 1, stride=2, padding="valid"),
    "circular padding of nothing": lambda: nn.Conv2d(8, 16, 1, stride=2, padding_mode="circular"),
    "a forward of its own": lambda: Standardised(8, 16, 1, stride=2),
    "no module": Functional,
    "a normalised weight": lambda: parametrizations.weight_norm(nn.Conv2d(8, 16, 1, stride=2)),
}
OTHERS = {
    "no stride": lambda: nn.Conv2d(8, 16, 1),
    "padded": lambda: nn.Conv2d(8, 16, 1, stride=2, padding=1),
    "3x3": lambda: nn.Conv2d(8, 16, 3, stride=2),
    "grouped": lambda: nn.Conv2d(8, 16, 1, stride=2, groups=2),
    "one channel a group": lambda: nn.Conv2d(8, 16, 1, stride=2, groups=8),
}


def network(kind):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), kind(), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.parametrize("name", KINDS)
def test_training_never_calls_it(name, mode):
    model = network(KINDS[name])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = Backwards()
    settings = {"mode": mode, "backend": collecting(seen.found)}
    step = flat_step(model, optimizer, resolve("pgd", {"steps": 1}), Threat(), **settings)
    with seen if mode == "eager" else nullcontext():
        step(torch.rand(4, 3, 8, 8), torch.arange(4))
    assert len(seen.found) >= 2
    assert not dangerous(seen.found)


@pytest.mark.parametrize("name", [*KINDS, *OTHERS])
def test_the_numbers_are_those_of_the_convolution(name):
    model = network((KINDS | OTHERS)[name])
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    inputs = [x, *model.parameters()]

    def gradients():
        logits = model(x)
        return [logits, *torch.autograd.grad(logits.logsumexp(1).sum(), inputs)]

    expected = gradients()
    with strides_taken_first(pointwise(model.modules(), CPU)):
        found = gradients()
    for own, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(own, plain)
    if name in OTHERS:
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_float64_is_left_alone():
    model = network(KINDS["a module"]).double()
    x = torch.rand(4, 3, 8, 8).double()
    expected = model(x)
    with strides_taken_first(pointwise(model.modules(), CPU)), Backwards() as seen:
        found = model(x)
        found.sum().backward()
    assert torch.equal(found, expected)
    assert ((16, 8, 1, 1), [2, 2], torch.float64) in seen.found


def test_the_model_is_left_as_it_was():
    model = network(KINDS["a module"])
    before = [dict(vars(module)) for module in model.modules()]
    with strides_taken_first(pointwise(model.modules(), CPU)):
        pass
    assert [dict(vars(module)) for module in model.modules()] == before


@SLOW
@pytest.mark.parametrize("width", [4, 8, 12])
def test_no_built_in_network_calls_it(width):
    """Where such a call breaks the heap, the process that searches ends; ours must not."""
    code = (
        "import torch; torch.set_num_threads(2)\n"
        "from crashing_convolutions import *\n"
        f"shapes = [s for s in shapes_of(list(MODELS), [{width}]) if s.stride > 1]\n"
        "shapes = [s for s in shapes if s.kernel == 1]\n"
        "assert shapes\n"
        "tried = dict(batches=[3, 7, 9], threads=2, mended=True)\n"
        "assert not [s for s in shapes if breaks(s, **tried)]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCH, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
