"""From gradients to an optimizer step: accumulation, loss scaling, clipping, masking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastadv.engine.model import parameter_hooks
from fastadv.engine.model.buffers import copy_into
from fastadv.engine.optimizer.faults import (
    Fault,
    Faults,
    all_finite,
    apply_where,
    counts_on_the_host,
    none_of,
    select_into,
    telling,
)
from fastadv.engine.optimizer.gradient_norm import total_norm
from fastadv.engine.optimizer.optimizer_copy import OptimizerCopy
from fastadv.engine.packing import FlatViews
from fastadv.errors import TrainingError

# A scale that was halved so often in a row is no overflow that goes away.
STARVED = 50
# Gradients of the scaled loss.
_SCALED = frozenset({Fault.DIRECTION, Fault.INPUT_GRADIENT, Fault.GRADIENT})


class Updater:
    """Hands gradients to the user's optimizer as ``backward()`` and ``step()`` would.

    ``scaler`` is a ``torch.amp.GradScaler`` for float16; ``max_grad_norm`` clips the norm over
    all parameters after unscaling. Whether an update counts stays on the device; only the first
    one waits for the answer, and with a scaler every update of an optimizer that counts its steps
    on the host.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
    ) -> None:
        self.optimizer = optimizer
        # A scaler that is switched off must not hide faults as overflows.
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self.scaler is not None and self.scaler._scale is None:
            # It makes its scale at the first use, and nothing could be put back there.
            self.scaler._lazy_init_scale_growth_tracker(device)
        self.max_grad_norm = max_grad_norm
        self.faults = Faults(device)
        self._one = torch.ones((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # updates in a row
        self._waiting = 0  # images whose gradients wait for the update
        self._learned: list[Tensor] = []  # in the update before
        self._begun = False  # whether the optimizer has made its state
        self._moved = FlatViews()

    @property
    def steady(self) -> bool:
        """True if an update is the same launches as the one before: the optimizer has its state,
        no gradient waits for more, and no scaler looks at it."""
        return self._begun and not self._waiting and self.scaler is None

    @torch.no_grad()
    def __call__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        loss: Tensor,
        number: Tensor,
        doubts: Mapping[Fault, Tensor],
        *,
        images: int,
        update: bool,
    ) -> tuple[Tensor, Tensor]:
        """Apply ``gradients`` of the mean loss of so many ``images``; returns their norm and
        whether the update counted (0-dim bool).

        ``doubts`` are what else must not be, 0-dim bool. With ``update=False`` the gradient waits:
        the next update takes the mean over the images of all.
        """
        if not self._waiting:
            self._clear_all_but(parameters)
        share = images / (self._waiting + images)
        if self._waiting:
            _add_to_waiting(parameters, gradients, share)
        else:
            _hand_over(parameters, gradients, keep=not update)
        parameter_hooks.accumulated(parameters, gradients)
        self._waiting = 0 if update else self._waiting + images
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.scaler is not None and update:
            self.scaler.unscale_(self.optimizer)
        norm = total_norm(found)
        found_bad = {**doubts, Fault.LOSS: ~loss.isfinite(), Fault.GRADIENT: ~norm.isfinite()}
        fine = none_of(found_bad)
        if self.scaler is not None:
            # A scaled gradient may overflow: then the scaler skips the update and lowers the scale.
            found_bad = {kind: bad for kind, bad in found_bad.items() if kind not in _SCALED}
        ok = self.faults.record(found_bad, number) & fine
        if not update:
            return norm, ok
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return norm, self._step(ok, number)

    def _clear_all_but(self, parameters: Sequence[Tensor]) -> None:
        """Clear ``.grad`` of parameters trained in the previous update but not in this one."""
        if len(parameters) == len(self._learned) and all(map(is_, parameters, self._learned)):
            return
        staying = {id(parameter) for parameter in parameters}
        for parameter in self._learned:
            if id(parameter) not in staying:
                parameter.grad = None
        self._learned = list(parameters)

    def _step(self, ok: Tensor, number: Tensor) -> Tensor:
        """Let the optimizer step where ``ok``; returns whether it did and nothing overflowed."""
        waits = self.scaler is not None and counts_on_the_host(self.optimizer)
        finite = torch.ones_like(ok)
        if self._begun and not waits:
            finite = apply_where(ok, self.optimizer.step, self.optimizer, self._moved)
        elif ok:
            finite = self._begin_step()
        # On a CPU there is nothing to record about an update that did not overflow.
        if ok.device.type != "cpu" or not finite:
            ok = ok & self.faults.record({Fault.UPDATE: ~finite}, number)
        if self.scaler is not None:
            self._update_scale(self.scaler, ok)
        return ok

    def _begin_step(self) -> Tensor:
        """The first step, which makes the optimizer's state."""
        before = OptimizerCopy(self.optimizer)
        before.take()
        self.optimizer.step()
        self._begun = True
        finite = all_finite(telling(self.optimizer))
        if not finite:
            before.put_back()
            self._begun = False
        return finite

    def _update_scale(self, scaler: torch.amp.GradScaler, ok: Tensor) -> None:
        """Raise or lower the loss scale; after a fault it stays."""
        self.skipped.copy_(torch.where(ok, 0, self.skipped + 1))
        state = scaler._per_optimizer_states[id(self.optimizer)]
        for overflowed in state["found_inf_per_device"].values():
            # A scaled gradient that is not the weights' (a perturbation's) may overflow alone.
            overflowed.copy_(torch.maximum(overflowed, (~ok).to(overflowed.dtype)))
        before = _scale_of(scaler)
        # Its own step would ask the device, and knows nothing of earlier faults.
        scaler.update()
        select_into(_scale_tensors(scaler), self.faults.bad_step < 0, before)

    def begin(self, scale: Tensor) -> None:
        """Put into ``scale`` (0-dim) what the loss of the coming update is multiplied by."""
        if self.scaler is not None:
            scale.copy_(self.scaler.scale(self._one))

    @property
    def waits(self) -> bool:
        """True if a gradient waits for the update."""
        return self._waiting > 0

    def moment(self) -> tuple[Any, ...]:
        """What ``return_to`` needs to undo what calls have noted here since."""
        scale = None if self.scaler is None else _scale_of(self.scaler)
        return self._waiting, list(self._learned), self._begun, scale

    def return_to(self, moment: tuple[Any, ...]) -> None:
        """Undo what calls have noted since ``moment``."""
        self._waiting, self._learned, self._begun, scale = moment
        if self.scaler is not None and scale is not None:
            # Between unscaling and updating it would refuse to unscale again.
            self.scaler._per_optimizer_states.clear()
            copy_into(_scale_tensors(self.scaler), scale)

    def check(self) -> None:
        """Raise ``TrainingError`` if an update was bad, or if none counts any more; waits."""
        self.faults.check()
        skipped = int(self.skipped)
        if self.scaler is not None and skipped >= STARVED:
            raise TrainingError(
                f"The last {skipped} updates were skipped because scaled gradients overflowed each "
                f"time; the loss scale is {self.scaler.get_scale():g}. The network has gradients "
                "that are not finite: lower the learning rate, or use bf16 or float32."
            )

    def healthy(self) -> bool:
        """True if ``check`` would pass; waits."""
        return self.faults.healthy() and int(self.skipped) < STARVED

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        faults = self.faults
        return {
            "bad_step": faults.bad_step,
            "fault": faults.kind,
            "skipped": self.skipped,
            "scaler": scaler,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.faults.bad_step.copy_(state["bad_step"])
        self.faults.kind.copy_(state["fault"])
        self.skipped.copy_(state["skipped"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])


def _scale_tensors(scaler: torch.amp.GradScaler) -> list[Tensor]:
    tensors: list[Any] = [scaler._scale, scaler._growth_tracker]
    return [tensor for tensor in tensors if tensor is not None]


def _scale_of(scaler: torch.amp.GradScaler) -> list[Tensor]:
    return [tensor.clone() for tensor in _scale_tensors(scaler)]


def _hand_over(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], *, keep: bool
) -> None:
    """Set each parameter's ``.grad``; ``keep``: it waits for the gradients of more batches."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            own = gradient
            if gradient.stride() != parameter.stride():
                own = _laid_out_as(gradient, parameter)
            # A gradient that waits must not be overwritten by the next replay of a CUDA graph.
            gradient = own.clone() if keep and own is gradient else own
        parameter.grad = gradient


def _add_to_waiting(
    parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], share: float
) -> None:
    """Make each parameter's ``.grad`` the mean of the waiting gradient, weighted 1 - ``share``, and
    of the new one, weighted ``share``."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        added = None if gradient is None else share * gradient
        if parameter.grad is None:
            parameter.grad = added if added is None else _laid_out_as(added, parameter)
            continue
        parameter.grad *= 1 - share
        if added is not None:
            parameter.grad += added


def _laid_out_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` in the parameter's memory format, as ``backward()`` leaves it.

    A convolution on channels_last images gives its weight such a gradient, whatever the weight is,
    and fused optimizers on a GPU refuse the pair.
    """
    strides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(size == 1 or own == wanted for size, own, wanted in strides):
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
