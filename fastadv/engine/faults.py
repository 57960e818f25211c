"""A loss that is not finite must not destroy the weights: a sticky flag, and updates it masks.

The flag lives on the device, so that nothing waits for it. It holds the first bad step; from
there on no update is applied and the weights stay the last good ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastadv.engine.buffers import copy_into
from fastadv.errors import TrainingError


class Faults:
    """``bad_step`` is the number of the first bad update, -1 while there is none."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def record(self, fine: Tensor, update: Tensor) -> Tensor:
        """Note whether this update is ``fine`` (0-dim bool); returns whether to apply it."""
        first_bad = ~fine & (self.bad_step < 0)
        self.bad_step.copy_(torch.where(first_bad, update, self.bad_step))
        return self.bad_step < 0

    def healthy(self) -> bool:
        """Whether no step was bad so far. Waits."""
        return int(self.bad_step) < 0

    def check(self) -> None:
        """Raise ``TrainingError`` naming the first bad step, if there was one. Waits."""
        step = int(self.bad_step)
        if step >= 0:
            raise TrainingError(
                f"The loss or a gradient stopped being finite at step {step}; nothing was updated "
                "from there on and the weights are the last good ones. Lower the learning rate, "
                "or use bf16 or float32 instead of fp16."
            )


@torch.no_grad()
def apply_where(ok: Tensor, update: Callable[[], object], optimizer: torch.optim.Optimizer) -> None:
    """Call ``update`` so that it changes weights and optimizer state only where ``ok``.

    On a CPU the flag is simply read. A fused optimizer masks itself; for any other on a GPU the
    tensors are copied and put back by a select, since reading the flag would stall the device. The
    optimizer must have its state already: what a masked first step leaves there is no state.
    """
    if ok.device.type == "cpu":
        if ok:
            update()
        return
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~ok).float()  # type: ignore[attr-defined]
        try:
            update()
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        return
    touched = _tensors(optimizer)
    before = [torch.empty_like(tensor) for tensor in touched]
    copy_into(before, touched)
    update()
    select_into(touched, ok, before)


@torch.no_grad()
def select_into(tensors: Sequence[Tensor], ok: Tensor, otherwise: Sequence[Tensor]) -> None:
    """Keep each tensor where ``ok``, else put ``otherwise`` back, in place."""
    for tensor, old in zip(tensors, otherwise, strict=True):
        torch.where(ok, tensor, old, out=tensor)


def counts_on_the_host(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer keeps something where no flag on the device can mask it.

    Adam counts its steps there, unless it is fused or capturable.
    """
    return any(tensor.device.type == "cpu" for tensor in _state(optimizer))


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What a step may change on the device."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    moving = [weight.detach() for weight in weights if weight.grad is not None]
    return moving + [tensor for tensor in _state(optimizer) if tensor.device.type != "cpu"]


def _state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = optimizer.state.values()
    return [value for state in states for value in state.values() if isinstance(value, Tensor)]
