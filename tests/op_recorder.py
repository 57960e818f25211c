"""A stand-in for CUDA graphs that repeats operations, without running Python code again.

Unlike ``tiny_capture.Replayer``, which calls the function again, this writes down every operation
of PyTorch's dispatcher, forward and backward, and does them again on the recorded memory: what is
written in place is written in place, what a view shows it shows again, other results are copied to
where they lay. As in a CUDA graph, a generator of PyTorch's that is the device's own draws anew at
each replay, another one cannot be recorded, nor can a look at a tensor's value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny_capture import DeviceNetwork
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastadv.engine.cuda_graph import WARM_UPS, NotReplayable
from fastadv.engine.model.forward_trace import depends_on_values
from fastadv.training.captured import CapturedUpdate
from fastadv.training.training_step import Step


class Log(TorchDispatchMode):
    """Every operation with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if depends_on_values(func, args):
            raise NotReplayable(f"{func} waits")
        if any(isinstance(each, torch.Generator) for each in tree_leaves((args, kwargs))):
            raise NotReplayable(f"{func} draws from a generator that is not registered")
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result


class Graph:
    """Stands in for ``CudaRecorder``."""

    def warm_up(self, function: Callable[[], Any]) -> None:
        generator = torch.get_rng_state()
        for _ in range(WARM_UPS + 1):
            function()
        torch.set_rng_state(generator)

    def __call__(
        self, function: Callable[[], Any], *, alone: bool = False
    ) -> tuple[Any, Callable[[], None]]:
        # A capture launches nothing: what the function wrote and drew is undone.
        generator = torch.get_rng_state()
        with Log() as log:
            result = function()
        torch.set_rng_state(generator)

        @torch.no_grad()
        def replay() -> None:
            for func, args, kwargs, recorded in log.operations:
                _write_over(recorded, func(*args, **kwargs))

        return result, replay


def _write_over(recorded: Any, new: Any) -> None:
    for own, other in zip(tree_leaves(recorded), tree_leaves(new), strict=True):
        if not isinstance(own, Tensor) or _memory(own) == _memory(other):
            continue
        if own.shape != other.shape:
            raise AssertionError("an operation of a graph has another shape")
        own.copy_(other)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def graphed(step: Step, *, strict: bool = True) -> Step:
    """``step``, replayed operation by operation from now on."""
    step.internals.net.__class__ = DeviceNetwork
    step.internals.passes = CapturedUpdate(step.internals.update, Graph(), strict=strict)
    return step
