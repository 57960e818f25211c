"""Objectives of searches: functions (n,) of logits (n,classes), which are maximised."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

TINY = 1e-12


def ce(logits: Tensor, y: Tensor) -> Tensor:
    """The cross entropy with the classes ``y`` (n,)."""
    return cross_entropy(logits, y, reduction="none")


def own_and_other(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (n,) of the classes ``y`` (n,), and the largest of the other classes."""
    own = y[:, None] == torch.arange(logits.shape[1], device=y.device)
    return logits.masked_fill(~own, 0.0).sum(1), logits.masked_fill(own, -float("inf")).amax(1)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y (Carlini & Wagner, 2017, f6): above 0 where another class wins."""
    own, other = own_and_other(logits, y)
    return other - own


def probability_margin(logits: Tensor, y: Tensor) -> Tensor:
    """max_{j != y} p_j - p_y, p the softmax of the logits (Xie et al., 2024, Eq. 4)."""
    return margin(logits.softmax(1), y)


def logit_scaled(logits: Tensor, y: Tensor) -> Tensor:
    """The cross entropy of z/(z_1 - z_2), z_1 >= z_2 >= ..., the divisor taken as a constant (Yu &
    Xu, 2023, MIFPE with t = 1): logits of any scale leave float32 a gradient."""
    top = logits.detach().topk(2, dim=1).values
    return ce(logits / (top[:, :1] - top[:, 1:] + TINY), y)


def of_class(logits: Tensor, y: Tensor) -> Tensor:
    """The logits (n,) of the classes ``y`` (n,)."""
    # Not gather: the summation order of its backward is not deterministic on CUDA.
    own = y[:, None] == torch.arange(logits.shape[1], device=y.device)
    return logits.masked_fill(~own, 0.0).sum(1)


def dlr(logits: Tensor, y: Tensor) -> Tensor:
    """-(z_y - max_{j != y} z_j)/(z_1 - z_3), z_1 >= z_2 >= ... (Croce & Hein, 2020, Eq. 6): the
    difference of logits ratio, which no scaling of the logits changes. Needs three classes."""
    top = logits.topk(3, dim=1).values
    return margin(logits, y) / (top[:, 0] - top[:, 2] + TINY)


def dlr_targeted(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """-(z_y - z_t)/(z_1 - (z_3 + z_4)/2) (Croce & Hein, 2020, Eq. 7). Needs four classes."""
    top = logits.topk(4, dim=1).values
    scale = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + TINY
    return -(of_class(logits, y) - of_class(logits, target)) / scale
