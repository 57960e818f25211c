"""Tensors on their way from the device to the host, which nobody waits for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Values = dict[str, Tensor]


class Arrivals:
    """Calls ``write`` with tensors on the host, in the order in which they were sent."""

    def __init__(self, write: Callable[[Values], None]) -> None:
        self._write = write
        self._coming: list[tuple[torch.cuda.Event, Values]] = []

    def send(self, values: Values) -> None:
        """Send ``values``. Those of a CUDA device are copied while the host goes on."""
        if not any(tensor.is_cuda for tensor in values.values()):
            self._write({name: tensor.detach().cpu() for name, tensor in values.items()})
            return
        copies = {
            name: torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
                tensor.detach(), non_blocking=True
            )
            for name, tensor in values.items()
        }
        event = torch.cuda.Event()
        event.record()
        self._coming.append((event, copies))
        self.settle(wait=False)

    def settle(self, *, wait: bool = True) -> None:
        """Write what has arrived; with ``wait``, all that was sent."""
        while self._coming:
            event, copies = self._coming[0]
            if wait:
                event.synchronize()
            elif not event.query():
                return
            self._write(copies)  # again, should an interruption come between the two
            self._coming.pop(0)
