"""Stratified selection of rows."""

import math

import torch
from torch import Tensor

from fastadv.data import draws


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
