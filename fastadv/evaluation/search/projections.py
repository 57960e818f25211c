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
    """The smallest level t >= 0 (n,) with sum_i weight_i min(t, ends_i) = amount; no lower than the
    largest end where the sum never gets there. ``weight`` and ``ends`` (n,D) and ``amount`` (n,)
    are not negative. NaN where all weights are 0 and the amount is."""
    find = by_tangents if weight.device.type == "cpu" else by_sorting
    return find(weight, ends, amount)


def by_tangents(weight: Tensor, ends: Tensor, amount: Tensor) -> Tensor:
    """``filled_to`` by Newton's method.

    The sum is piecewise linear and concave in t, so that its tangents lead upward to the level and
    reach it in finitely many steps, of which a few are the rule. Each reads a value, which costs
    nothing on a CPU, where sorting takes many times as long.
    """
    level, full = torch.zeros_like(amount), ends <= 0
    while True:
        before = torch.where(full, weight * ends, 0.0).sum(1)
        rising = torch.where(full, 0.0, weight).sum(1)
        # Not downward by a rounding error; above all ends there is no tangent left.
        level = torch.where(rising > 0, torch.maximum(level, (amount - before) / rising), level)
        now = ends <= level[:, None]
        if torch.equal(now, full):
            return level
        full = now


def by_sorting(weight: Tensor, ends: Tensor, amount: Tensor) -> Tensor:
    """``filled_to`` from the sums at all ends; reads no value."""
    ends, order = ends.sort(dim=1)
    weight = weight.gather(1, order)
    before = torch.nn.functional.pad((weight * ends).cumsum(1)[:, :-1], (1, 0))
    rising = weight.flip(1).cumsum(1).flip(1)  # of this pixel and those after it
    passed = before + ends * rising < amount[:, None]
    k = passed.sum(1, keepdim=True).clamp(max=ends.shape[1] - 1)
    return (amount - before.gather(1, k)[:, 0]) / rising.gather(1, k)[:, 0]
