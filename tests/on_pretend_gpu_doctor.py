"""``fastadv doctor --gpu``'s captured steps on a pretended GPU; ``test_cuda_fake.py`` runs it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pretend_gpu as gpu
import pytest
from pretend_steps import captured

from fastadv.benchmark.installation.finding import Finding, findings
from fastadv.benchmark.installation.step_checks import captured_checks


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with gpu.pretend_gpu():
        yield


def found() -> list[Finding]:
    """The mode of the step is eager, since this device is not CUDA: ``captured`` records it."""
    return list(findings(captured_checks(gpu.DEVICE, "eager", captured), limit=math.inf))


def test_captured_steps_are_as_eager_ones() -> None:
    assert [(each.passed, each.said[:24]) for each in found()] == [
        (True, "as eager after 3 updates")
    ] * 2


def test_a_replay_that_leaves_out_a_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu.Recording.replay

    def replay(self: Any) -> None:
        kept, self.calls = (
            self.calls,
            [c for c in self.calls if "convolution_backward" not in str(c[0])],
        )
        real(self)
        self.calls = kept

    monkeypatch.setattr(gpu.Recording, "replay", replay)
    for each in found():
        assert each.passed is False
        assert "not" in each.said or "differs from eager" in each.said, each
