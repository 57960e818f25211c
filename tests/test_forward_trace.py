"""The reads, random draws and operations of a call, which decide if it can be recorded."""

import random

import numpy
import pytest
import torch
from torch import nn
from torch.nn import functional

from fastadv.engine.model.forward_trace import traced

OWN = random.Random(3)
OWN_NUMPY = numpy.random.default_rng(0)

LOOKS = {
    "item": lambda h: h * h.mean().item(),
    "a branch": lambda h: h * 2 if h.mean() > 0 else h,
    "an index": lambda h: h[int(h.flatten().argmax()) % 2],
    "tolist": lambda h: h * h.tolist()[0][0][0][0],
    "numpy": lambda h: h + torch.from_numpy(h.detach().numpy()),
    "an array": lambda h: h * float(numpy.asarray(h.detach()).mean()),
    "equal": lambda h: h if torch.equal(h, h) else 2 * h,
    "a mask that changes the shape": lambda h: h[h > 0],
}
DRAWS = {
    "random": lambda h: h * random.random(),
    "numpy.random": lambda h: h * float(numpy.random.rand()),
}
CHANGES = {
    "a factor": lambda h: h * OWN.random(),
    "a tensor of it": lambda h: h * torch.tensor(OWN.random()),
    "an array of it": lambda h: h * torch.from_numpy(OWN_NUMPY.random(4)).view(1, 4, 1, 1),
    "a probability": lambda h: functional.dropout(h, OWN.random()),
    "a depth": lambda h: h if OWN.random() < 0.5 else 2 * h,
}
STATIC = {
    "nothing": lambda h: h,
    "torch's noise": lambda h: h + torch.rand_like(h),
    "a mask": lambda h: torch.where(h > h.mean(), h, 0),
    "numbered rows": lambda h: h[:, torch.tensor([2, 0])],
    "a constant": lambda h: h * torch.tensor(0.5),
}


def trace_of(between):
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 4, 3)

    def function():
        loss = between(convolution(torch.ones(2, 3, 8, 8))).square().sum()
        return torch.autograd.grad(loss, list(convolution.parameters()))

    return lambda: traced(function)[1]


@pytest.mark.parametrize("name", LOOKS)
def test_reading_a_value_is_detected(name):
    assert trace_of(LOOKS[name])().looks


@pytest.mark.parametrize("name", DRAWS)
def test_a_random_draw_on_the_host_is_detected(name):
    assert trace_of(DRAWS[name])().draws == [name]


@pytest.mark.parametrize("name", CHANGES)
def test_calls_with_other_operations_differ(name):
    trace = trace_of(CHANGES[name])
    first = trace()
    assert any(first.difference(trace()) for _ in range(8))


@pytest.mark.parametrize("name", STATIC)
def test_calls_that_a_graph_can_repeat_are_equal(name):
    trace = trace_of(STATIC[name])
    first, second = trace(), trace()
    assert first.difference(second) is None
    assert len(first.operations) > 3
    assert not first.looks
    assert not first.draws


def test_the_result_is_the_functions_own():
    x = torch.rand(3, requires_grad=True)
    (slope,), _ = traced(lambda: torch.autograd.grad(x.square().sum(), [x]))
    torch.testing.assert_close(slope, 2 * x.detach())
