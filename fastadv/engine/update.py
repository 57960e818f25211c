"""From gradients to an optimizer step: accumulation, loss scaling, clipping, masking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastadv.engine.faults import Faults, apply_where


class Updater:
    """Hands gradients to the user's optimizer as ``backward()`` and ``step()`` would.

    ``scaler`` is a ``torch.amp.GradScaler`` for float16; ``max_grad_norm`` clips the norm over
    all parameters after unscaling.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        scaler: torch.amp.GradScaler | None,
        max_grad_norm: float | None,
    ) -> None:
        self.optimizer = optimizer
        self.scaler = scaler
        self.max_grad_norm = max_grad_norm
        self.faults = Faults(device)
        self._one = torch.ones((), device=device)
        self._waiting = 0
        self._scale = self._one

    def scale(self) -> Tensor:
        """What the loss of this update is multiplied by, a 0-dim tensor."""
        return self._scale

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
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if self._waiting and parameter.grad is not None and gradient is not None:
                parameter.grad += gradient
            elif gradient is not None or not self._waiting:
                # What waits for more must not be overwritten by the next replay of a graph.
                parameter.grad = gradient if update or gradient is None else gradient.clone()
        self._waiting = 0 if update else self._waiting + 1
        found = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if self.scaler is not None and update:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.get_total_norm(found)
        finite = loss.isfinite() & norm.isfinite()
        # A scaled gradient may overflow: then the scaler skips the update and lowers the scale.
        ok = self.faults.record(loss.isfinite() if self.scaler else finite, number) & finite
        if not update:
            return norm, ok
        if self.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        self._step(ok)
        return norm, ok

    def _step(self, ok: Tensor) -> None:
        if self.scaler is None:
            apply_where(ok, self.optimizer.step, self.optimizer)
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def begin(self) -> None:
        """Read the scale of the coming update."""
        if self.scaler is not None and self.scaler.is_enabled():
            self._scale = self.scaler.scale(self._one)

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.scaler is None else self.scaler.state_dict()
        return {"bad_step": self.faults.bad_step, "scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.faults.bad_step.copy_(state["bad_step"])
        if self.scaler is not None and state["scaler"] is not None:
            self.scaler.load_state_dict(state["scaler"])
