"""Counts images that an attack in training did not move at all."""

from __future__ import annotations

import torch
from torch import Tensor

ENOUGH = 0.1  # of the images: below, nothing is said


class Still:
    """How many of the images attacked since the last look had no gradient; kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._still = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        self._said = False

    @torch.no_grad()
    def add(self, unmoved: Tensor) -> None:
        """Take in which images of a batch were not moved, (B,) bool."""
        self._still += unmoved.sum()
        self._seen += len(unmoved)

    def sentence(self) -> str | None:
        """What is wrong, if many were not; waits."""
        still, seen = int(self._still), int(self._seen)
        if not seen or still < ENOUGH * seen:
            return None
        return (
            f"The attack moved no pixel of {still} of {seen} images ({100 * still / seen:.0f} %): "
            "its gradient was exactly zero there, and the network trains on clean images. Look for "
            "rounding or saturation in the network that hides its gradient."
        )

    def sentence_once(self) -> str | None:
        """``sentence`` the first time there is one; counts anew. Waits."""
        found = None if self._said else self.sentence()
        self._said = self._said or found is not None
        self._still.zero_()
        self._seen.zero_()
        return found
