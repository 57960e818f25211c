"""The start: the point at which an attack begins."""

from __future__ import annotations

from torch import Tensor

from fastadv.algorithms.contract.part import Part
from fastadv.algorithms.contract.tensors import Batch


class Start(Part):
    """Where the attack begins, in place of the adversary's own start.

    Adversaries with ``takes_start`` call it for each attack, unless the caller gave a start.
    The state per sample of such a part is a perturbation of each training image.
    """

    def point(self, batch: Batch, restart: int = 0) -> Tensor:
        """The start (B,C,H,W) of restart number ``restart``. It may lie outside of the box: the
        first step clips it. ``batch.x`` is the centre of the ball."""
        raise NotImplementedError
