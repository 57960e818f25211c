"""Objectives of searches: functions (n,) of logits (n,classes), which are maximised."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

TINY = 1e-12


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """The cross entropy with the classes ``y`` (n,)."""
    return cross_entropy(logits, y, reduction="none")


def of_class(logits: Tensor, y: Tensor) -> Tensor:
    """The logits (n,) of the classes ``y`` (n,)."""
    # Not gather: the summation order of its backward is not deterministic on CUDA.
    own = y[:, None] == torch.arange(logits.shape[1], device=y.device)
    return logits.masked_fill(~own, 0.0).sum(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """-(z_y - max_{j != y} z_j)/(z_1 - z_3), z_1 >= z_2 >= ... (Croce & Hein, 2020, Eq. 6): the
    difference of logits ratio, which no scaling of the logits changes. Needs three classes."""
    own = y[:, None] == torch.arange(logits.shape[1], device=y.device)
    true = logits.masked_fill(~own, 0.0).sum(1)
    other = logits.masked_fill(own, -float("inf")).amax(1)
    top = logits.topk(3, dim=1).values
    return -(true - other) / (top[:, 0] - top[:, 2] + TINY)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t)/(z_1 - (z_3 + z_4)/2) (Croce & Hein, 2020, Eq. 7). Needs four classes."""
    top = logits.topk(4, dim=1).values
    scale = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + TINY
    return -(of_class(logits, y) - of_class(logits, target)) / scale
