"""A loss that is not finite must not destroy the weights: a sticky flag, and updates it masks.

The flag lives on the device, so that nothing waits for it. It holds the first bad step; from
there on no update is applied and the weights stay the last good ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
    tensors are copied and put back by a select, since reading the flag would stall the device.
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
    before = [tensor.detach().clone() for tensor in touched]
    update()
    select_into(touched, ok, before)


def select_into(tensors: Sequence[Tensor], ok: Tensor, otherwise: Sequence[Tensor]) -> None:
    """Keep each tensor where ``ok``, else put ``otherwise`` back, in place."""
    for tensor, old in zip(tensors, otherwise, strict=True):
        tensor.copy_(torch.where(ok, tensor, old))


def _tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    found = [weight for group in optimizer.param_groups for weight in group["params"]]
    for state in optimizer.state.values():
        found += [value for value in state.values() if isinstance(value, Tensor)]
    return [tensor for tensor in found if tensor.device.type != "cpu"]
