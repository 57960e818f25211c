"""Stratified selection of rows, and labels with artificial noise."""

import math

import torch
from torch import Tensor

from fastadv.data import draws
from fastadv.errors import UserError


def stratified_rows(labels: Tensor, count: int, stream: int, seed: int) -> Tensor:
    """``count`` rows of ``labels`` (N,), sorted, each class in proportion (largest remainder)."""
    total = len(labels)
    _, classes, sizes = torch.unique(labels, return_inverse=True, return_counts=True)
    exact = sizes.double() * (count / total)
    quota = exact.floor().long()
    order = torch.argsort(quota.double() - exact, stable=True)
    quota[order[: count - int(quota.sum())]] += 1
    shuffled = draws.shuffled(torch.arange(total), stream, seed)
    by_class = shuffled[torch.argsort(classes[shuffled], stable=True)]
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    rank_in_class = torch.arange(total) - starts
    return by_class[rank_in_class < quota[classes[by_class]]].sort().values


def split_rows(labels: Tensor, fraction: float, stream: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of ``labels`` outside and inside a stratified sample of ``ceil(fraction * N)``."""
    chosen = stratified_rows(labels, math.ceil(fraction * len(labels)), stream, seed)
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[chosen] = False
    return rest.nonzero().flatten(), chosen


def noisy_labels(labels: Tensor, rate: float, num_classes: int, seed: int) -> Tensor:
    """Labels (N,) int64 after one application of the transition matrix (1 - r) I + (r / C) 1 1^T.

    With probability ``rate`` a label is replaced by a uniform draw over all ``num_classes``
    classes, including the true one, so that ``rate=1`` gives random labels (memorization paper,
    arXiv 2106.01606). The same seed gives the same labels. Raises ``UserError`` for a rate outside
    [0,1].
    """
    if not 0 <= rate <= 1:
        raise UserError(f"The rate of noisy labels must lie between 0 and 1, not {rate}.")
    rows = torch.arange(len(labels), device=labels.device)
    drawn = draws.integers(rows, num_classes, draws.NOISE_LABEL, seed)
    return torch.where(draws.uniform(rows, draws.NOISE, seed) < rate, drawn, labels)
