"""What the gradients of an attack say about whether it attacked at all."""

from __future__ import annotations

import torch
from torch import Tensor

NO_ATTACK = (
    "The network's outputs or their gradient at the images are not finite, so there is no attack "
    "and the images would look robust; look for overflowing statistics or an operation without a "
    "slope, judge an earlier checkpoint, or judge without amp."
)


class Watch:
    """Counts, kept on the device, over the gradients of one attack on one batch.

    ``bad``: whether a gradient was not finite, 0-dim bool. ``still``: how many images were
    classified right where the attack began and had a gradient there of exactly zero, 0-dim int64.
    """

    def __init__(self, device: torch.device) -> None:
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.still = torch.zeros((), dtype=torch.int64, device=device)
        self._first = True

    @torch.no_grad()
    def see(self, gradient: Tensor, right: Tensor) -> None:
        """Take in the ``gradient`` (B,...) of images of which some are classified ``right``."""
        steepest = gradient.flatten(1).abs().amax(1)
        self.bad |= ~steepest.isfinite().all()
        if self._first:
            self.still += (right & (steepest == 0)).sum()
            self._first = False
