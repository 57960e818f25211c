"""Tells probabilities from logits by their values."""

from __future__ import annotations

from torch import Tensor


def are_probabilities(outputs: Tensor) -> Tensor:
    """0-dim bool: the ``outputs`` (n,classes) look like those of a softmax or of sigmoids."""
    # The outputs of a softmax add up to 1; those of a sigmoid are confident one by one.
    sums, largest = outputs.sum(1), outputs.amax(1)
    softmax, sigmoid = (sums - 1).abs().amax() < 1e-3, largest.mean() > 0.5
    return (outputs.amin() >= 0) & (largest.amax() <= 1) & (softmax | sigmoid)
