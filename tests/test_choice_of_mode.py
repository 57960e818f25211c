"""The mode that mode="auto" chooses."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_batch, tiny_model, tiny_step

from fastadv.training.mode import compiles, first_mode


@pytest.mark.parametrize(
    ("amx", "total_steps", "expected"),
    [
        (True, 10**9, "compiled"),  # years of work
        (True, 10, "eager"),  # seconds
        (True, None, "eager"),  # the length of the run is unknown
        (False, 10**9, "eager"),  # compiling saves nothing there
    ],
)
def test_auto_compiles_only_long_runs(amx, total_steps, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    step = tiny_step(tiny_model(), "pgd", mode="auto", total_steps=total_steps)
    x, *_ = tiny_batch()
    assert step.resolve_mode(x) == expected
    assert step.internals.net.runner.compiles == (expected == "compiled")


def test_double_backward_is_not_compiled_by_auto(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    step = tiny_step(tiny_model(), "pgd-igr", mode="auto", total_steps=10**9)
    assert step.resolve_mode(tiny_batch()[0]) == "eager"


def test_cuda_is_captured():
    assert first_mode("auto", torch.device("cuda")) == "captured"
    assert compiles("captured", 10**6)
    assert not compiles("captured", 10)
