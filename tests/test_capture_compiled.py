"""Compiled regions in a recording: everything is compiled before the capture begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch._dynamo.testing
from every_recipe import call, step_of
from tiny import assert_same
from tiny_capture import DeviceNetwork, Replayer
from tiny_staged import staged_model

from fastadv.engine.cuda_graph import WARM_UPS
from fastadv.training.captured import CapturedUpdate


class Watching(Replayer):
    """Warms up as ``CudaRecorder`` does, and records compilations during a capture."""

    def __init__(self, compiler: Any) -> None:
        self.compiler = compiler
        self.late: list[str] = []

    def warm_up(self, function: Callable[[], Any]) -> None:
        for _ in range(WARM_UPS):
            function()
        self._watched("the warm-up that may not wait", function)

    def __call__(
        self, function: Callable[[], Any], *, alone: bool = False
    ) -> tuple[Any, Callable[[], None]]:
        record: tuple[Any, Callable[[], None]] = self._watched(
            "the capture", lambda: Replayer.__call__(self, function)
        )
        return record

    def _watched(self, when: str, function: Callable[[], Any]) -> Any:
        before = self.compiler.frame_count
        result = function()
        if self.compiler.frame_count > before:
            self.late.append(when)
        return result


@pytest.mark.slow
@pytest.mark.parametrize("method", ["apart", "trades-awp", "pgd-eval", "te", "fgsm-n-advlc"])
def test_nothing_is_compiled_during_a_capture(method: str) -> None:
    compiler = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    eager = step_of(method, staged_model())
    step = step_of(method, staged_model(), "compiled", backend=compiler)
    step.internals.net.__class__ = DeviceNetwork
    recorder = Watching(compiler)
    step.internals.passes = CapturedUpdate(step.internals.update, recorder)
    for update, count in enumerate([6, 4, 6, 4]):
        call(eager, update, count)
        call(step, update, count)
    assert compiler.frame_count > 0
    assert recorder.late == []
    assert_same(eager.model, step.model, tolerance=1e-9)
