"""The bytes between the products, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from fastadv.algorithms.contract.passes import FORWARD, INPUT_GRADIENT, SHARED
from fastadv.benchmark.geometry import Geometry, geometry
from fastadv.benchmark.traffic import (
    AFTER,
    AT_INPUT,
    AT_OUTPUT,
    BEFORE,
    BN,
    ELSEWHERE,
    MEAN,
    MOVE,
    SUM,
    UNREAD,
)
from fastadv.models import build_model


@pytest.mark.parametrize(("width", "size"), [(64, 32), (16, 64)])
def test_bytes_of_preact_resnet18_equal_a_count_by_hand(width: int, size: int) -> None:
    """Per image and in elements of the first stage's activations, a; each stage's are half of the
    one before. Every BatchNorm's kernels are written down with the tensors they move."""
    a = width * size**2
    stages = [a, a / 2, a / 4, a / 8]
    last = stages[-1]
    forward = backward = evaluated = evaluated_backward = 0.0
    for number, here in enumerate(stages):
        wide = stages[max(0, number - 1)]  # of the stage's input
        # The stage's first BatchNorm: its input is a sum, except in the first stage.
        forward += wide * (3 if number == 0 else 5)
        evaluated += wide * (2 if number == 0 else 3)  # the sum is not stored
        # Two convolutions read its result; in the first stage a convolution, and its input a skip.
        backward += wide * (5 + (1 if number == 0 else 2))
        evaluated_backward += wide * (3 + 1)
        # The two inside the blocks: x is read twice, y written; g and x are read twice, the
        # gradient is written. In eval mode everything is read once. x comes from a convolution
        # and y goes into one.
        forward += 2 * 3 * here
        backward += 2 * 5 * here
        evaluated += 2 * 2 * here
        evaluated_backward += 2 * 3 * here
        # The second block's first: its input is a sum, which the skip path also reads.
        forward += 5 * here
        backward += (5 + 1) * here
        evaluated += 4 * here
        evaluated_backward += (3 + 1) * here
    # The last: reads the summands, writes the sum, reads it; its mean is not an activation. Its
    # gradient is one number per channel: reads x twice, writes the gradient.
    forward += 4 * last
    backward += 3 * last
    evaluated += 2 * last
    evaluated_backward += 2 * last
    found = geometry(build_model("preact_resnet18", width=width), (3, size, size))
    assert found.other_bytes(FORWARD, "train", 2) == 2 * forward
    assert found.other_bytes(INPUT_GRADIENT, "train", 2) == 2 * (forward + backward)
    assert found.other_bytes(SHARED, "train", 4) == 4 * (forward + 2 * backward)
    assert found.other_bytes(FORWARD, "eval", 2) == 2 * evaluated
    assert found.other_bytes(INPUT_GRADIENT, "eval", 2) == 2 * (evaluated + evaluated_backward)
    if (width, size) == (64, 32):
        assert round(512 * 2 * (forward + backward) / 1e9, 2) == 5.47


class Residual(nn.Module):
    """One convolution into two BatchNorms, as in a residual block; ``how`` they are added."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        y = self.first(x)
        if self.how == "in place":
            y += x
            return self.second(y.relu()).flatten(1)
        if self.how == "rectified":
            return (y.relu() + x).flatten(1)
        if self.how == "pooled":
            return functional.max_pool2d(torch.cat([y, x], 1), 2).flatten(1)
        return functional.adaptive_avg_pool2d(functional.relu(self.second(y * 2 + x)), 1)


E = 4 * 6 * 6


@pytest.mark.parametrize(
    ("how", "moved"),
    [
        ("in place", {BN: 2 * E, AFTER: E, AT_INPUT: E}),
        ("rectified", {BN: E, SUM: E, AT_INPUT: E}),
        ("pooled", {BN: E, AT_INPUT: E, MOVE: 2 * E + 2 * E / 4}),
        ("before", {BN: 2 * E, BEFORE: E, UNREAD: E, AT_INPUT: E, MEAN: E}),
    ],
)
def test_sums_are_counted_where_they_are_made(how: str, moved: dict[str, float]) -> None:
    assert geometry(Residual(how), (3, 6, 6)).moved == moved


def test_bytes_of_a_residual_network_after_activation() -> None:
    """torchvision's ResNet-18: three sums have a projection, one BatchNorm more."""
    found: Geometry = geometry(build_model("torchvision:resnet18"), (3, 32, 32))
    first, pooled = 64 * 16 * 16, 64 * 8 * 8
    stages = [pooled, pooled / 2, pooled / 4, pooled / 8]
    assert found.moved == {
        BN: first + 4 * sum(stages) + sum(stages[1:]),
        AFTER: 2 * sum(stages),
        # Each sum but the last is read by the next block's convolution and by its shortcut.
        AT_OUTPUT: 2 * sum(stages) - stages[-1],
        ELSEWHERE: pooled,  # the pool's result, by the same two
        MOVE: pooled,
        MEAN: stages[-1],
    }
