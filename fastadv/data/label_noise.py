"""Noise of labels: some are replaced by labels that are drawn at random."""

import torch
from torch import Tensor

from fastadv.data import draws


def noisy_labels(labels: Tensor, rate: float, num_classes: int, seed: int) -> Tensor:
    """``labels`` (N,) int64, each replaced with probability ``rate`` by one of all ``num_classes``
    classes, its own among them: rate (C - 1)/C of them are wrong, and 1 are random labels.

    The draws of a label depend only on ``seed`` and its row, and a label that is replaced at one
    rate is replaced by the same one at every higher rate.
    """
    rows = torch.arange(len(labels), device=labels.device)
    drawn = draws.integers(rows, num_classes, draws.NOISY_LABELS, seed)
    return torch.where(draws.uniform(rows, draws.NOISY_ROWS, seed) < rate, drawn, labels)
