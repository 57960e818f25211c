"""Captured steps without CUDA: a recorder that replays by calling again.

A CUDA graph repeats kernels on fixed addresses. The same contract holds for a recorder whose
replay runs the function again and copies its results into the first run's tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastadv.engine.model.network import Network
from fastadv.training.captured import CapturedUpdate
from fastadv.training.training_step import Step


class Replayer:
    """Stands in for ``CudaRecorder``."""

    def warm_up(self, function: Callable[[], Any]) -> None:
        function()

    def __call__(
        self, function: Callable[[], Any], *, alone: bool = False
    ) -> tuple[Any, Callable[[], None]]:
        result = function()

        def replay() -> None:
            _copy(result, function())

        return result, replay


def _copy(own: Any, new: Any) -> None:
    if isinstance(own, Tensor):
        own.copy_(new)
    elif isinstance(own, dict):
        for key in own:
            _copy(own[key], new[key])
    elif isinstance(own, (list, tuple)):
        for pair in zip(own, new, strict=True):
            _copy(*pair)


class DeviceNetwork(Network):
    """A network whose values Python must not read, as on a GPU: other branches are taken."""

    @property
    def syncs_are_free(self) -> bool:
        return False


def capture(step: Step) -> Step:
    """``step``, replayed by a stand-in for CUDA graphs from now on."""
    step.internals.net.__class__ = DeviceNetwork
    step.internals.passes = CapturedUpdate(step.internals.update, Replayer())
    return step
