"""Captured steps, with a recorder that replays by calling the function again.

Static inputs must be filled, warm-ups must leave no trace, new situations are recorded once.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_capture import Replayer
from torch import Tensor

import fastadv
from fastadv.training.captured import CapturedUpdate


def make(method: str, captured: bool, **options: Any) -> tuple[torch.nn.Module, fastadv.Step]:
    torch.manual_seed(0)
    model = fastadv.build_model("preact_resnet18", width=2, in_channels=1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    step = fastadv.step(
        model,
        optimizer,
        method,
        eps=0.1,
        num_samples=32,
        total_steps=8,
        steps_per_epoch=4,
        mode="eager",
        **options,
    )
    if captured:
        step.internals.passes = CapturedUpdate(step.internals.update, Replayer())
    return model, step


def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    sizes = (8, 8, 8, 6) * 2  # the last batch of an epoch is short
    return [
        (
            torch.rand(size, 1, 8, 8, dtype=torch.float64, generator=generator),
            torch.randint(0, 10, (size,), generator=generator),
            torch.randperm(32, generator=generator)[:size],
        )
        for size in sizes
    ]


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("apart", {"averaging": "ema"}),
        ("pgd", {"steps": 2}),
        ("trades", {"steps": 2, "weights": "awp"}),
        ("rwp", {"steps": 2, "weight_steps": 2, "c_min": 9.0}),
    ],
)
def test_replayed_steps_equal_eager_ones(method, options):
    eager_model, eager = make(method, False, **options)
    model, step = make(method, True, **options)
    for x, y, index in batches():
        expected = eager(x, y, index)["loss"]
        assert torch.equal(step(x, y, index)["loss"], expected)
    for name, value in eager_model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    for name, value in eager.state.items():
        assert torch.equal(step.state[name], value), name
    assert step.internals.passes.recorded == 2  # the full batch and the short one


def test_metrics_are_not_overwritten_by_the_next_replay():
    _, step = make("pgd", True, steps=1)
    (first, *_), (second, *_) = (step(x, y, index).values() for x, y, index in batches()[:2])
    assert first.data_ptr() != second.data_ptr()
    assert first != second


def test_a_moved_parameter_is_recorded_once_more():
    model, step = make("pgd", True, steps=1)
    x, y, index = batches()[0]
    step(x, y, index)
    weight = model.conv1.weight
    weight.data = weight.data.clone()
    step(x, y, index)
    step(x, y, index)
    assert step.internals.passes.recorded == 2


def test_a_loaded_state_is_replayed_without_recording():
    _, step = make("apart", True)
    x, y, index = batches()[0]
    step(x, y, index)
    state = copy.deepcopy(step.state_dict())  # a state_dict is live
    step(x, y, index)
    moved = step.state["omega"].clone()
    step.load_state_dict(state)
    assert not torch.equal(step.state["omega"], moved)
    step(x, y, index)
    assert step.internals.passes.recorded == 1


def test_a_part_that_becomes_active_is_recorded():
    _, step = make("awp", True, steps=1, warmup_epochs=1)
    for x, y, index in batches():
        step(x, y, index)
    assert (
        step.internals.passes.recorded == 4
    )  # two batch shapes, with and without the perturbation


def test_captured_without_cuda_is_refused():
    model = fastadv.build_model("preact_resnet18", width=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(fastadv.UserError, match="needs a CUDA device"):
        fastadv.step(model, optimizer, "pgd", mode="captured")
