"""Counts the images that the attack of training did not move."""

from __future__ import annotations

import torch
from torch import Tensor

ENOUGH = 0.1  # share of unmoved images from which on the user is warned


class UnmovedCounter:
    """The number of images without a gradient, of those attacked since the last warning check; both
    counts are on the device."""

    def __init__(self, device: torch.device) -> None:
        self._unmoved = torch.zeros((), dtype=torch.int64, device=device)
        self._seen = torch.zeros((), dtype=torch.int64, device=device)
        self._said = False

    @torch.no_grad()
    def add(self, unmoved: Tensor) -> None:
        """Add one batch; ``unmoved`` (B,) bool is true for each image that was not moved."""
        self._unmoved += unmoved.sum()
        self._seen += len(unmoved)

    def sentence(self) -> str | None:
        """A warning if the share of unmoved images is at least ``ENOUGH``, otherwise None; waits
        for the device."""
        unmoved, seen = int(self._unmoved), int(self._seen)
        if not seen or unmoved < ENOUGH * seen:
            return None
        return (
            f"The attack moved no pixel of {unmoved} of {seen} images "
            f"({100 * unmoved / seen:.0f} %): its gradient was exactly zero there, and the "
            "network trains on clean images. Look for rounding or saturation in the network that "
            "hides its gradient."
        )

    def sentence_once(self) -> str | None:
        """``sentence``, but only the first one, otherwise None. Sets the counts to zero; waits for
        the device."""
        found = None if self._said else self.sentence()
        self._said = self._said or found is not None
        self._unmoved.zero_()
        self._seen.zero_()
        return found
