"""From gradients to an optimizer step: accumulation, loss scaling, clipping, masking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadv.engine import parameter_hooks
from fastadv.engine.faults import Faults, apply_where, counts_on_the_host


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
        self.max_grad_norm = max_grad_norm
        self.faults = Faults(device)
        self._one = torch.ones((), device=device)
        self._waiting = 0
        self._learned: list[Tensor] = []  # in the update before
        self._begun = False  # whether the optimizer has made its state

    @property
    def steady(self) -> bool:
        """Whether an update is the same launches as the one before: the optimizer has its state,
        no gradient waits for more, and no scaler looks at it."""
        return self._begun and not self._waiting and self.scaler is None

    @torch.no_grad()
    def __call__(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        loss: Tensor,
        number: Tensor,
        *,
        update: bool,
    ) -> tuple[Tensor, Tensor]:
        """Apply ``gradients``; returns their norm and whether the update counted (0-dim bool)."""
        if not self._waiting:
            self._clear_all_but(parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            self._hand_over(parameter, gradient, keep=not update)
        parameter_hooks.accumulated(parameters, gradients)
        self._waiting = 0 if update else self._waiting + 1
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.scaler is not None and update:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(found)
        finite = loss.isfinite() & norm.isfinite()
        # A scaled gradient may overflow: then the scaler skips the update and lowers the scale.
        ok = self.faults.record(finite if self.scaler is None else loss.isfinite(), number) & finite
        if not update:
            return norm, ok
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        self._step(ok)
        return norm, ok

    def _clear_all_but(self, parameters: Sequence[Tensor]) -> None:
        """Whoever learned in the update before and is frozen now has no gradient any more."""
        staying = {id(parameter) for parameter in parameters}
        for parameter in self._learned:
            if id(parameter) not in staying:
                parameter.grad = None
        self._learned = list(parameters)

    def _hand_over(self, parameter: Tensor, gradient: Tensor | None, *, keep: bool) -> None:
        """Set or add to ``parameter.grad``; ``keep``: more is to be added to it."""
        if gradient is None:
            if not self._waiting:
                parameter.grad = None
            return
        if self._waiting and parameter.grad is not None:
            parameter.grad += gradient
            return
        own = _laid_out_as(gradient, parameter)
        # What waits for more must not be overwritten by the next replay of a graph.
        parameter.grad = own.clone() if keep and own is gradient else own

    def _step(self, ok: Tensor) -> None:
        waits = self.scaler is not None and counts_on_the_host(self.optimizer)
        if self._begun and not waits:
            apply_where(ok, self.optimizer.step, self.optimizer)
        elif ok:
            self.optimizer.step()
            self._begun = True
        if self.scaler is not None:
            # Its own step would ask the device, and knows nothing of earlier faults.
            self.scaler.update()

    def begin(self, scale: Tensor) -> None:
        """Put into ``scale`` (0-dim) what the loss of the coming update is multiplied by."""
        if self.scaler is not None:
            scale.copy_(self.scaler.scale(self._one))

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"bad_step": self.faults.bad_step, "scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.faults.bad_step.copy_(state["bad_step"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])


def _laid_out_as(gradient: Tensor, parameter: Tensor) -> Tensor:
    """``gradient`` in the parameter's memory format, as ``backward()`` leaves it.

    A convolution on channels_last images gives its weight such a gradient, whatever the weight is,
    and fused optimizers on a GPU refuse the pair.
    """
    strides = zip(gradient.shape, gradient.stride(), parameter.stride(), strict=True)
    if all(size == 1 or own == wanted for size, own, wanted in strides):
        return gradient
    return torch.empty_like(parameter).copy_(gradient)
