"""The nearest point of a hyperplane inside a box, as a move from another point (Croce & Hein, 2020,
"Minimally distorted adversarial examples with a fast adaptive boundary attack", Sec. 2.2)."""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SLOPE = 1e-8  # in L2 the published code moves no pixel on which the plane depends by less


def onto_hyperplane(norm: str, w: Tensor, excess: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The smallest move (n,D) in ``norm`` ("linf" or "l2") with <w, move> = -excess and
    low <= move <= high. Where no move of the box goes so far, the one that goes farthest.

    ``w`` (n,D): the normals. ``excess`` (n,): <w, point> - b for the hyperplane <w, .> = b.
    ``low`` <= 0 <= ``high`` (n,D): the ends of the box as seen from the point.

    Every pixel moves against the sign of its w, until it is at its end of the box: in Linf all by
    the same amount, in L2 in proportion to w.
    """
    w = torch.where(excess >= 0, 1.0, -1.0).to(w.dtype)[:, None] * w
    steep, room = w.abs(), torch.where(w < 0, high, -low)
    if norm == "linf":
        moves = steep > 0
        size = torch.minimum(filled_to(steep, room, excess.abs())[:, None], room)
    else:
        moves = steep >= LEAST_SLOPE
        steep = torch.where(moves, steep, 1.0)
        weight = torch.where(moves, steep.square(), 0.0)
        level = filled_to(weight, room / steep, excess.abs())
        size = torch.minimum(level[:, None] * steep, room)
    return torch.where(moves, torch.where(w < 0, size, -size), 0.0)


def filled_to(weight: Tensor, ends: Tensor, amount: Tensor) -> Tensor:
    """The smallest level t >= 0 (n,) with sum_i weight_i min(t, ends_i) = amount; infinite where
    the sum never gets there. ``weight`` and ``ends`` (n,D) and ``amount`` (n,) are not negative."""
    ends, order = ends.sort(dim=1)
    weight = weight.gather(1, order)
    full = (weight * ends).cumsum(1)  # of the pixels up to this one
    before = torch.nn.functional.pad(full[:, :-1], (1, 0))
    rising = weight.flip(1).cumsum(1).flip(1)  # of this pixel and those after it
    reached = before + ends * rising
    k = (reached < amount[:, None]).sum(1, keepdim=True)
    last = k.clamp(max=ends.shape[1] - 1)
    level = (amount - before.gather(1, last)[:, 0]) / rising.gather(1, last)[:, 0]
    level = torch.where(amount > 0, level, 0.0)
    return torch.where(amount < reached[:, -1], level, float("inf"))
