"""The package's own Python calls in one eager step are counted and limited."""

from __future__ import annotations

import pytest
import torch
from calls import package_calls, table

import fastadv

LIMITS = {"fgsm": 350, "pgd": 565}


@pytest.mark.parametrize("method", LIMITS)
def test_an_eager_step_makes_few_calls(method: str) -> None:
    """PreActResNet-18 of width 2, without the calls of the network itself; the fourth step."""
    torch.manual_seed(0)
    model = fastadv.build_model("preact_resnet18", width=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    step = fastadv.step(model, optimizer, method, mode="eager")
    x, y = torch.rand(8, 3, 32, 32), torch.randint(10, (8,))
    for _ in range(3):
        step(x, y)
    calls = package_calls(lambda: step(x, y))
    assert 0 < calls.total() <= LIMITS[method], table(calls)
