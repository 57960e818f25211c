"""The benchmark of ``quick``: how its passes are counted, and its table."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from bench_script import script
from torch import nn

import fastadv


def test_passes_are_counted_in_images() -> None:
    bench = script("quick_attack")
    counted = bench.Counted(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)))
    x = torch.rand(5, 3, 2, 2)
    with torch.no_grad():
        counted(x)
    assert (counted.forwards, counted.backwards) == (5, 0)
    for _ in range(2):
        leaf = x[:3].clone().requires_grad_()
        logits = counted(leaf)
        # As FAB does: two gradients of one forward pass.
        torch.autograd.grad(logits[:, 0].sum(), leaf, retain_graph=True)
        torch.autograd.grad(logits[:, 1].sum(), leaf)
    assert (counted.forwards, counted.backwards) == (11, 12)


def test_the_verdicts_are_those_of_evaluate() -> None:
    bench = script("quick_attack")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10)).eval()
    x = torch.rand(30, 3, 2, 2)
    y = model(x).argmax(1)
    y[:3] += 1
    y %= 10
    config: Any = SimpleNamespace(eps=0.03, norm="linf")
    right, forwards, backwards = bench.attacked("quick", model, x, y, config, 0)
    score = fastadv.evaluate(model, [(x, y)], attacks=("quick",), eps=0.03)["quick"]
    assert 0 < int(right.sum()) < 27
    assert abs(int(right.sum()) / 30 - score) < 1e-6
    assert forwards >= 30 + 27
    assert 0 < backwards < forwards


def test_the_table_has_a_line_for_each_network() -> None:
    table = script("evaluation_table").quick_table
    assert table([], lambda row: "") == "No run has been measured yet."
    network = {"method": "trades", "data": "digits", "width": 4}
    row = {
        "kind": "quick attack", "attack": "quick", "network": network, "n": 200, "date": "1",
        "clean": 0.9, "autoattack": 0.46, "accuracy": 0.455, "difference": -0.005,
        "passes": [46.0, 41.9], "autoattack_passes": [3700.0, 950.0], "run": "a",
    }  # fmt: skip
    noise = row | {"network": network | {"method": "n-fgsm", "alpha": 0.0}}
    older = row | {"date": "0", "accuracy": 0.1, "run": "b"}
    found = table([older, row, noise], lambda row: f"measured {row['date']}").splitlines()
    line = "| trades | digits | 4 | 200 | 90.0 | 46.0 | 45.5 | -0.5 | 46 + 41.9 | 3,700 + 950 |"
    other = line.replace("trades", "n-fgsm, noise alone")
    assert sorted(found[2:4]) == [other, line]
    assert found[4:] == ["", "measured 1"]
