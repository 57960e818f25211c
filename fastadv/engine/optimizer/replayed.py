"""The optimizer's part of an update as a separate CUDA graph, if the optimizer can be captured.

It is replayed between the graphs of the passes and recorded apart from them. What it has fixed
(momentum, weight decay, the addresses of the optimizer's state) may change before any update. That
update then runs eagerly, and the passes need no new recording.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Adamax, AdamW, NAdam, RAdam, optimizer

from fastadv.engine.cuda_graph import NotReplayable
from fastadv.engine.optimizer.faults import Fault
from fastadv.engine.optimizer.updater import Updater
from fastadv.errors import warn

# With capturable=True none of these waits for the device, in any implementation of its step.
# (RMSprop and Adadelta do in the implementation that goes tensor by tensor.)
CAPTURABLE = (Adam, AdamW, Adamax, NAdam, RAdam)
_DTYPE = attrgetter("dtype")
MAX_RERECORDINGS = 4  # per recording of the passes; then the settings are assumed to keep changing
PAYS_OFF = 20  # replays of a recording, after which it is not counted (a momentum by the epoch)


class Replaying:
    """What the recordings of one updater share: its learning rates, and ``refused``, which is True
    if the optimizer turned out not to be replayable.

    Fused SGD and ``CAPTURABLE`` optimizers are replayed if their weights are float32 or narrower
    and they have no hooks and no gradient scaler. The learning rates of such an optimizer are
    tensors in every update, replayed or not, and filled from ``param_groups`` when they change. A
    rate that is rounded to float32 in some updates only would make a resumed run differ.
    """

    def __init__(self, updater: Updater, recorder: Any) -> None:
        self.updater = updater
        self.recorder = recorder
        self.refused = False
        self._rates: list[_Rate] = []  # by position, since loading a state replaces the groups
        # Torch warns if the step of a capturable optimizer is not captured; the first one is not.
        vars(updater.optimizer)["_warned_capturable_if_run_uncaptured"] = True

    @contextmanager
    def rates_as_tensors(self, device: torch.device) -> Iterator[None]:
        """Within this context the rate of each group is a tensor on ``device`` with its value."""
        groups = self.updater.optimizer.param_groups
        while len(self._rates) < len(groups):
            self._rates.append(_Rate(device))
        self.fill()
        before = [group["lr"] for group in groups]
        try:
            for group, rate in zip(groups, self._rates, strict=True):
                group["lr"] = rate.tensor
            yield
        finally:
            for group, given in zip(groups, before, strict=True):
                group["lr"] = given

    def fill(self) -> None:
        """Copy the rates of ``param_groups`` into the tensors."""
        for group, rate in zip(self.updater.optimizer.param_groups, self._rates, strict=True):
            rate.fill(group["lr"])


class ReplayedUpdate:
    """``Updater``, replayed for passes that write their ``gradients`` to the same addresses.

    An update is recorded if only the rate has changed since the previous one, so with a momentum
    that changes in every update none is recorded, and with one that changes with the epoch one in
    each epoch.
    """

    def __init__(self, shared: Replaying, gradients: Sequence[Tensor | None]) -> None:
        self.shared = shared
        self.optimizer = shared.updater.optimizer
        self._gradients = list(gradients)
        self._seen: Hashable = None
        self._recording: _Recording | None = None
        self._left = MAX_RERECORDINGS
        self._held: list[Tensor] = []  # the parameters of the optimizer
        self._ours: list[Tensor] = []
        self._others: list[Tensor] = []  # of the optimizer's, those that do not learn

    def __call__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        loss: Tensor,
        number: Tensor,
        faults_found: Mapping[Fault, Tensor],
        *,
        images: int,
        update: bool,
    ) -> tuple[Tensor, Tensor]:
        """``Updater.__call__``. If it is replayed, the returned tensors belong to the recording:
        the next replay overwrites them."""
        shared = self.shared
        allowed = update and _is_capturable(self.optimizer)
        if allowed and self._may_replay(parameters, gradients):
            frozen = _frozen(self.optimizer)
            known, self._seen = self._seen, frozen
            if self._recording is None or self._recording.frozen != frozen:
                if self._recording is not None and self._recording.replays >= PAYS_OFF:
                    self._left += 1
                again = frozen == known and self._left > 0
                self._recording = None
                if again:
                    self._record(frozen, parameters, gradients, loss, number, faults_found, images)
            if self._recording is not None:
                shared.fill()
                return self._recording.replay()
        with shared.rates_as_tensors(loss.device) if allowed else nullcontext():
            return shared.updater(
                parameters, gradients, loss, number, faults_found, images=images, update=update
            )

    def _may_replay(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> bool:
        """True if this update reads the gradients of the recorded passes and no others."""
        if self.shared.refused or not self.shared.updater.steady:
            return False
        held = _held(self.optimizer)
        if not _same(held, self._held) or not _same(parameters, self._ours):
            ours = {id(parameter) for parameter in parameters}
            self._others = [parameter for parameter in held if id(parameter) not in ours]
            self._held, self._ours = held, list(parameters)
        # A gradient from other code may be at another address next time.
        alone = all(parameter.grad is None for parameter in self._others)
        return alone and _same(gradients, self._gradients)

    def _record(
        self,
        frozen: Hashable,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        loss: Tensor,
        number: Tensor,
        faults_found: Mapping[Fault, Tensor],
        images: int,
    ) -> None:
        self._left -= 1
        shared = self.shared
        try:
            with shared.rates_as_tensors(loss.device):
                # Not in the pool of the passes: the graph of the end of the update was recorded
                # before this one and is replayed after it.
                returned, replay = shared.recorder(
                    lambda: shared.updater(
                        parameters,
                        gradients,
                        loss,
                        number,
                        faults_found,
                        images=images,
                        update=True,
                    ),
                    alone=True,
                )
        except (NotReplayable, torch.OutOfMemoryError) as error:
            shared.refused = True
            reason = getattr(error, "reason", "out of memory")
            warn(
                f"The optimizer cannot be replayed as a CUDA graph ({reason}); it is launched "
                "operation by operation."
            )
            return
        self._recording = _Recording(frozen, parameters, returned, replay)


class _Recording:
    """One graph: the settings it has fixed, its results, and the gradients it leaves."""

    def __init__(
        self, frozen: Hashable, parameters: Sequence[Tensor], returned: Any, replay: Any
    ) -> None:
        self.frozen = frozen
        self.parameters = list(parameters)
        self.gradients = [parameter.grad for parameter in parameters]
        self._returned, self._replay = returned, replay
        self.replays = 0

    def replay(self) -> tuple[Tensor, Tensor]:
        self._replay()
        self.replays += 1
        # The caller may have cleared them since.
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        norm, ok = self._returned
        return norm, ok


class _Rate:
    """The learning rate of a group as a tensor that a graph can read."""

    def __init__(self, device: torch.device) -> None:
        self.tensor = torch.zeros((), device=device, dtype=torch.float32)
        self._value: float | None = None

    def fill(self, given: float | Tensor) -> None:
        """Copy ``given`` if it has changed since the last update."""
        if isinstance(given, Tensor) and given.device.type != "cpu":
            self.tensor.copy_(given)
        elif self._value != float(given):
            self._value = float(given)
            self.tensor.fill_(self._value)


def _is_capturable(own: torch.optim.Optimizer) -> bool:
    """True if ``optimizer.step()`` only launches kernels, the same ones each time.

    A rate on the device is float32, since fused kernels take no other, and too coarse for float64
    weights.
    """
    if type(own) not in (SGD, *CAPTURABLE):
        return False  # a wrapper may lack the attributes below
    hooks = (
        own._optimizer_step_pre_hooks,
        own._optimizer_step_post_hooks,
        optimizer._global_optimizer_pre_hooks,
        optimizer._global_optimizer_post_hooks,
    )
    # A scheduler wraps the optimizer's step in a function that counts calls.
    step = vars(own).get("step")
    wrapped = step is not None and getattr(step, "__wrapped__", None) is not type(own).step
    if any(hooks) or wrapped:
        return False
    asked = "fused" if type(own) is SGD else "capturable"
    return torch.float64 not in map(_DTYPE, _held(own)) and all(
        group[asked]
        and not group["differentiable"]
        and not any(map(_has_tensors, _settings(group).values()))
        for group in own.param_groups
    )


def _held(own: torch.optim.Optimizer) -> list[Any]:
    return list(chain.from_iterable(group["params"] for group in own.param_groups))


def _same(first: Sequence[Any], second: Sequence[Any]) -> bool:
    return len(first) == len(second) and all(map(is_, first, second))


def _frozen(own: torch.optim.Optimizer) -> Hashable:
    """What a recording has fixed: the addresses of the state, and every setting but the rate."""
    state = list(chain.from_iterable(map(dict.values, own.state.values())))
    return (
        tuple([value.data_ptr() if isinstance(value, Tensor) else value for value in state]),
        tuple([tuple(map(id, group["params"])) for group in own.param_groups]),
        tuple([tuple(_settings(group).items()) for group in own.param_groups]),
    )


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "lr")}


def _has_tensors(value: Any) -> bool:
    """True if ``value`` is or contains a tensor. The step reads the value of such a hyper-parameter
    on the host."""
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(_has_tensors, value)))
