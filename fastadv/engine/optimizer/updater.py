"""From gradients to an optimizer step: accumulation, loss scaling, clipping, masking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from fastadv import kernels
from fastadv.engine.model import parameter_hooks
from fastadv.engine.model.buffers import copy_into
from fastadv.engine.optimizer.faults import (
    Fault,
    Faults,
    all_finite,
    apply_if,
    apply_masked,
    counts_on_the_host,
    telling,
)
from fastadv.engine.optimizer.gradient_norm import total_norm
from fastadv.engine.optimizer.optimizer_copy import OptimizerCopy
from fastadv.engine.packing import FlatViews
from fastadv.errors import NotFinite, UserError

# If this many updates in a row were skipped, a lower loss scale does not help.
STARVED = 50
# Faults in gradients of the scaled loss.
_SCALED = frozenset({Fault.DIRECTION, Fault.INPUT_GRADIENT, Fault.GRADIENT})


class Updater:
    """Applies gradients with the user's optimizer as ``backward()`` and ``step()`` would.

    ``scaler`` is a ``torch.amp.GradScaler`` for float16; ``max_grad_norm`` clips the norm over
    all parameters after unscaling. The flag that says if an update counts stays on the device. Only
    the first update waits for it, and with a scaler every update of an optimizer that counts its
    steps on the host.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
    ) -> None:
        self.optimizer = optimizer
        # A disabled scaler must not hide faults as overflows.
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if self.scaler is not None and self.scaler._scale is None:
            # Otherwise it creates its scale at the first use, which could not be undone.
            self.scaler._lazy_init_scale_growth_tracker(device)
        self.max_grad_norm = max_grad_norm
        self.faults = Faults(device)
        self._one = torch.ones((), device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)  # skipped in a row
        self.images_waiting = 0  # the gradient of their mean loss waits in .grad for an update
        self._kept: list[tuple[Tensor, int]] = []  # parameters with such a gradient, its version
        self._learned: list[Tensor] = []  # parameters of the previous update
        self._begun = False  # True once the optimizer has its state
        self._moved = FlatViews()

    @property
    def steady(self) -> bool:
        """True if an update is the same launches as the previous one: the optimizer has its state,
        no gradient waits for an update, and there is no scaler."""
        return self._begun and not self.images_waiting and self.scaler is None

    @torch.no_grad()
    def join(
        self, parameters: Sequence[Tensor], gradients: list[Tensor | None], images: int
    ) -> int:
        """Make ``gradients``, of the mean loss over ``images`` images, those of the mean over all
        images since the last update, in place; returns the number of these images. Raises
        ``UserError`` if the caller has cleared the gradient that waits."""
        waiting = self.images_waiting
        if not waiting:
            return images
        self._require_kept()
        share = images / (waiting + images)
        for place, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            added = None if gradient is None else share * gradient
            if parameter.grad is None:
                gradients[place] = added
                continue
            parameter.grad *= 1 - share
            if added is not None:
                parameter.grad += added
            gradients[place] = parameter.grad
        return waiting + images

    def _require_kept(self) -> None:
        kept = [(parameter.grad, version) for parameter, version in self._kept]
        gone = any(gradient is None for gradient, _ in kept)
        # A value is read only if all gradients were written since.
        if gone or all(g is not None and g._version != v and not g.any() for g, v in kept):
            raise UserError(
                "The gradient that waits for an update (update=False) was cleared: call "
                "zero_grad() only after a call that updates, or leave it out."
            )

    @torch.no_grad()
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
        """Apply ``gradients``, as ``join`` left them, after a batch of ``images`` images with the
        mean ``loss``. Returns their norm, and true (0-dim bool) if the update counted.

        ``number`` is the number of the update (0-dim int64). ``faults_found`` is fault -> 0-dim
        bool; the update counts only if all are false. With ``update=False`` the gradient waits for
        the next call.
        """
        if not self.images_waiting:
            self._clear_all_but(parameters)
        _hand_over(parameters, gradients, keep=not update and not self.images_waiting)
        parameter_hooks.accumulated(parameters, gradients)
        self.images_waiting = 0 if update else self.images_waiting + images
        self._kept = []
        if not update:
            self._kept = [(p, p.grad._version) for p in parameters if p.grad is not None]
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.scaler is not None and update:
            self.scaler.unscale_(self.optimizer)
        norm = total_norm(found)
        signs = {**faults_found, Fault.LOSS: loss, Fault.GRADIENT: norm}
        # If a scaled gradient overflows, the scaler skips the update and lowers the scale.
        unrecorded = frozenset() if self.scaler is None else _SCALED
        ok, unfit = self.faults.record(signs, number, unrecorded=unrecorded)
        if not update:
            # Gradients that wait keep the loss scale, which the scaler removes at the update.
            return norm if self.scaler is None else norm / self._scale_now(), ok
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        return norm, self._step(ok, unfit, number)

    def _clear_all_but(self, parameters: Sequence[Tensor]) -> None:
        """Clear ``.grad`` of parameters trained in the previous update but not in this one."""
        if len(parameters) == len(self._learned) and all(map(is_, parameters, self._learned)):
            return
        staying = {id(parameter) for parameter in parameters}
        for parameter in self._learned:
            if id(parameter) not in staying:
                parameter.grad = None
        self._learned = list(parameters)

    def _step(self, ok: Tensor, unfit: Tensor | None, number: Tensor) -> Tensor:
        """Step the optimizer if ``ok`` (0-dim bool); returns true if it stepped and nothing
        overflowed. ``unfit`` as ``Faults.record`` returns it."""
        own = self.optimizer

        def record(overflowed: Tensor) -> Tensor:
            return self.faults.record({Fault.UPDATE: overflowed}, number, ok=ok)[0]

        waits = self.scaler is not None and counts_on_the_host(own)
        if self._begun and not waits and unfit is not None:
            ok = apply_masked(ok, unfit, own.step, own, record)
        else:
            finite = torch.ones_like(ok)
            if self._begun and not waits:
                finite = apply_if(ok, own.step, own, self._moved)
            elif ok:
                finite = self._begin_step()
            # On a CPU an update that did not overflow needs no record.
            if ok.device.type != "cpu" or not finite:
                ok = record(~finite)
        if self.scaler is not None:
            self._update_scale(self.scaler, ok)
        return ok

    def _begin_step(self) -> Tensor:
        """The first step, which creates the optimizer's state; undone if it overflows."""
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
        """Raise or lower the loss scale; after a fault it does not change."""
        self.skipped.copy_(torch.where(ok, 0, self.skipped + 1))
        state = scaler._per_optimizer_states[id(self.optimizer)]
        for overflowed in state["found_inf_per_device"].values():
            # A scaled gradient of other tensors (a direction of the weights) may overflow alone.
            overflowed.copy_(torch.maximum(overflowed, (~ok).to(overflowed.dtype)))
        before = _scale_of(scaler)
        # scaler.step would wait for the device, and does not know of earlier faults.
        scaler.update()
        kernels.put_back_unless(_scale_tensors(scaler), before, self.faults.none_so_far())

    def begin(self, scale: Tensor) -> None:
        """Copy the loss scale of the next update into ``scale`` (0-dim)."""
        if self.scaler is not None:
            scale.copy_(self._scale_now())

    def _scale_now(self) -> Tensor:
        return self._one if self.scaler is None else self.scaler.scale(self._one)

    @property
    def waits(self) -> bool:
        """True if a gradient waits for an update."""
        return self.images_waiting > 0

    def moment(self) -> tuple[Any, ...]:
        """The present state of this object, for ``return_to``."""
        scale = None if self.scaler is None else _scale_of(self.scaler)
        return self.images_waiting, self._kept, list(self._learned), self._begun, scale

    def return_to(self, moment: tuple[Any, ...]) -> None:
        """Return to the state at which ``moment`` was called."""
        self.images_waiting, self._kept, self._learned, self._begun, scale = moment
        if self.scaler is not None and scale is not None:
            # After unscaling and before its update the scaler would refuse to unscale again.
            self.scaler._per_optimizer_states.clear()
            copy_into(_scale_tensors(self.scaler), scale)

    def check(self) -> None:
        """Raise ``NotFinite`` if an update was bad, or if the scaler skipped the last
        ``STARVED`` updates; waits for the device."""
        self.faults.check()
        skipped = int(self.skipped)
        if self.scaler is not None and skipped >= STARVED:
            raise NotFinite(
                f"The last {skipped} updates were skipped because scaled gradients overflowed each "
                f"time; the loss scale is {self.scaler.get_scale():g}. The network has gradients "
                "that are not finite: lower the learning rate, or use bf16 or float32."
            )

    def healthy(self) -> bool:
        """True if ``check`` would not raise; waits for the device."""
        return self.faults.healthy() and int(self.skipped) < STARVED

    def state_dict(self) -> dict[str, Any]:
        """The fault flag, the count of skipped updates and the scaler's state; tensors are live."""
        scaler = None if self.scaler is None else self.scaler.state_dict()
        faults = self.faults
        return {
            "bad_step": faults.bad_step,
            "fault": faults.kind,
            "skipped": self.skipped,
            "scaler": scaler,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a ``state_dict``, in place. A gradient that waits is dropped."""
        self.images_waiting, self._kept = 0, []
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
    """Set ``.grad`` of each parameter; with ``keep`` it must outlast the next batch."""
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            own = gradient
            if gradient.stride() != parameter.stride():
                own = _laid_out_as(gradient, parameter)
            # The next replay of a CUDA graph must not overwrite a gradient that waits.
            gradient = own.clone() if keep and own is gradient else own
        parameter.grad = gradient


def _laid_out_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` in the memory format of ``parameter``, as ``backward()`` leaves it.

    With channels_last images a convolution's weight gets a channels_last gradient, whatever the
    format of the weight, and fused optimizers on a GPU refuse that.
    """
    strides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(size == 1 or own == wanted for size, own, wanted in strides):
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
