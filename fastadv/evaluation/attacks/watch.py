"""Detects attacks that cannot work: values that are not finite, gradients of exactly zero."""

from __future__ import annotations

import torch
from torch import Tensor


class Watch:
    """What the gradients of one attack on one batch were like, kept on the device.

    ``bad``: True once logits or a gradient were not finite, 0-dim bool. ``flat`` (B,) bool: the
    image was classified correctly at the starting point and had a gradient of exactly zero there;
    None if no gradient was taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.flat: Tensor | None = None

    @torch.no_grad()
    def see(self, gradient: Tensor, logits: Tensor, correct: Tensor | None) -> None:
        """Record the ``gradient`` (B,...) and the ``logits`` (B,...) at a point; ``correct`` (B,)
        bool: classified correctly. None if nothing says what is right: a gradient of zero may then
        be an optimum, and is not counted."""
        steepest = gradient.flatten(1).abs().amax(1)
        # Logits that were filled with NaN have a gradient of zero.
        self.bad |= ~(steepest.isfinite().all() & logits.isfinite().all())
        if self.flat is None and correct is not None:
            self.flat = correct & (steepest == 0)
