"""The optimizer's part of an update as a CUDA graph of its own, where its kind allows that.

It stands between the graphs of the passes and is recorded apart from them: what it has frozen
(momentum, weight decay, where the optimizer's state lies) may change before any update, which then
runs as written, and the passes need no new recording for it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as torch_optimizer

from fastadv.engine.recorder import NotReplayable
from fastadv.engine.update import Updater


class ReplayedUpdate:
    """``updater``, replayed for the recording whose ``gradients`` lie where they always do.

    Replayed are fused SGD and torch's own optimizers with ``capturable=True``, in float32 or less,
    without hooks and without a gradient scaler; a learning rate is a tensor while they are
    recorded, filled from ``param_groups`` when it has changed. An update is recorded when nothing
    else has changed since the one before, so a momentum that moves every time is never recorded.
    """

    def __init__(self, updater: Updater, recorder: Any, gradients: Sequence[Tensor | None]) -> None:
        self.updater = updater
        self.optimizer = updater.optimizer
        self.recorder = recorder
        self._gradients = list(gradients)
        self._seen: Hashable = None
        self._recording: _Recording | None = None
        self._refused = False

    def __call__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        loss: Tensor,
        number: Tensor,
        *,
        update: bool,
    ) -> tuple[Tensor, Tensor]:
        """``Updater.__call__``; replayed, the tensors returned are the recording's own."""
        frozen = self._frozen(gradients) if update else None
        known, self._seen = self._seen, frozen
        if frozen is None or frozen != known:
            self._recording = None
        elif self._recording is None:
            self._recording = self._recorded(parameters, gradients, loss, number)
        if self._recording is None:
            return self.updater(parameters, gradients, loss, number, update=update)
        return self._recording.replay()

    def _frozen(self, gradients: Sequence[Tensor | None]) -> Hashable:
        """What a recording of this update would hold fast; None if it must run as written."""
        same = all(given is own for given, own in zip(gradients, self._gradients, strict=True))
        if self._refused or not same or not self.updater.steady or not _allows(self.optimizer):
            return None
        state = (value for values in self.optimizer.state.values() for value in values.values())
        return tuple(map(_held_fast, state)), tuple(map(_settings, self.optimizer.param_groups))

    def _recorded(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        loss: Tensor,
        number: Tensor,
    ) -> _Recording | None:
        try:
            return _Recording(self.updater, self.recorder, parameters, gradients, loss, number)
        except NotReplayable as error:
            warnings.warn(f"{error} The optimizer is launched as it is.", stacklevel=6)
            self._refused = True
            return None


class _Recording:
    """One graph: what it returns, the learning rates it reads, the gradients it leaves."""

    def __init__(
        self,
        updater: Updater,
        recorder: Any,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        loss: Tensor,
        number: Tensor,
    ) -> None:
        self.parameters = list(parameters)
        self.rates = [_Rate(group, loss.device) for group in updater.optimizer.param_groups]
        with _as_tensors(self.rates):
            # The graph that settles was recorded before and is replayed after it, and the caller
            # may look at gradients later still.
            self.returned, self._replay = recorder(
                lambda: updater(parameters, gradients, loss, number, update=True), alone=True
            )
        self.gradients = [parameter.grad for parameter in parameters]

    def replay(self) -> tuple[Tensor, Tensor]:
        for rate in self.rates:
            rate.fill()
        self._replay()
        # The caller may have taken them away since.
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        norm, ok = self.returned
        return norm, ok


class _Rate:
    """A group's learning rate where a graph can read it."""

    def __init__(self, group: dict[str, Any], device: torch.device) -> None:
        self.group = group
        self.value = float("nan")
        given = group["lr"]
        self.given = isinstance(given, Tensor) and given.device == device
        self.tensor = given if self.given else torch.zeros((), device=device)

    def fill(self) -> None:
        """Take over the group's number where it is another than at the last update."""
        if self.given:
            return
        value = float(self.group["lr"])
        if value != self.value:
            self.tensor.fill_(value)
            self.value = value


@contextmanager
def _as_tensors(rates: Sequence[_Rate]) -> Iterator[None]:
    before = [rate.group["lr"] for rate in rates]
    try:
        for rate in rates:
            rate.group["lr"] = rate.tensor
        yield
    finally:
        for rate, given in zip(rates, before, strict=True):
            rate.group["lr"] = given


def _allows(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step of it is launches only, the same every time.

    A rate on the device is float32 (fused kernels read no other), too coarse for float64 weights.
    """
    hooks: list[dict[int, Callable[..., Any]]] = [
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        torch_optimizer._global_optimizer_pre_hooks,
        torch_optimizer._global_optimizer_post_hooks,
    ]
    # A scheduler puts a counting step of its own over the optimizer's.
    step = vars(optimizer).get("step")
    own = step is None or getattr(step, "_wrapped_by_lr_sched", False)
    if any(hooks) or not own or not type(optimizer).__module__.startswith("torch.optim."):
        return False
    asked = "fused" if isinstance(optimizer, torch.optim.SGD) else "capturable"
    return all(
        group.get(asked) and all(p.dtype != torch.float64 for p in group["params"])
        for group in optimizer.param_groups
    )


def _settings(group: dict[str, Any]) -> Hashable:
    """All of a group but its rate, unless that lies on a device."""
    params = tuple(id(parameter) for parameter in group["params"])
    rest = (
        (name, _held_fast(value))
        for name, value in group.items()
        if name != "params" and (name != "lr" or _on_a_device(value))
    )
    return params, tuple(rest)


def _on_a_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


def _held_fast(value: Any) -> Hashable:
    """A tensor's place, or the value of what is none."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    return tuple(value) if isinstance(value, list) else value
