"""Detects attacks that cannot work: gradients that are not finite or exactly zero."""

from __future__ import annotations

import torch
from torch import Tensor

NO_ATTACK = (
    "The network's outputs or their gradient at the images are not finite, so no attack is "
    "possible and the images would look robust; check for overflowing statistics or an operation "
    "without a gradient, evaluate an earlier checkpoint, or evaluate without amp."
)


class Watch:
    """Counts, kept on the device, over the gradients of one attack on one batch.

    ``bad``: True once a gradient was not finite, 0-dim bool. ``zero_gradient``: number of images
    that were classified correctly at the starting point and had a gradient of exactly zero there,
    0-dim int64.
    """

    def __init__(self, device: torch.device) -> None:
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        self.zero_gradient = torch.zeros((), dtype=torch.int64, device=device)
        self._first = True

    @torch.no_grad()
    def see(self, gradient: Tensor, correct: Tensor | None) -> None:
        """Record the ``gradient`` (B,...); ``correct`` (B,) bool: classified correctly. None if
        nothing says what is right: a gradient of zero may then be an optimum, and is not
        counted."""
        steepest = gradient.flatten(1).abs().amax(1)
        self.bad |= ~steepest.isfinite().all()
        if self._first and correct is not None:
            self.zero_gradient += (correct & (steepest == 0)).sum()
            self._first = False
