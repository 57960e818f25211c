"""The smallest move onto a hyperplane inside a box, against solvers and the published code."""

import numpy as np
import pytest
import torch
from pyautoattack import fab_projections
from scipy.optimize import brentq, linprog

from fastadv.evaluation.search.projections import by_sorting, by_tangents, onto_hyperplane


def planes(count, size, seed=0):
    """Points in [0,1], some of their pixels at the ends, normals with zeros, and what the points
    are in excess of the planes; some planes are too far for the box."""
    generator = torch.Generator().manual_seed(seed)
    t = torch.rand(count, size, generator=generator).double()
    t = torch.where(t < 0.2, 0.0, torch.where(t > 0.8, 1.0, t))
    w = torch.randn(count, size, generator=generator).double()
    w = torch.where(torch.rand(count, size, generator=generator) < 0.1, 0.0, w)
    excess = torch.randn(count, generator=generator).double() * size**0.5 * 0.7
    return t, w, excess


def smallest_linf(w, excess, low, high):
    """The smallest size of a move in Linf, by a linear program; None if there is none."""
    size = len(w)
    eye, one = np.eye(size), np.ones((size, 1))
    found = linprog(
        np.r_[np.zeros(size), 1],
        A_ub=np.block([[eye, -one], [-eye, -one]]),
        b_ub=np.zeros(2 * size),
        A_eq=np.r_[w, 0][None],
        b_eq=[-excess],
        bounds=[*zip(low, high, strict=True), (0, None)],
    )
    return found.fun if found.success else None


def smallest_l2(w, excess, low, high):
    """The same in L2: the move is -a w clipped to the box, with a root for a (KKT)."""

    def left(a):
        return w @ np.clip(-a * w, low, high) + excess

    far = 1e9 * np.sign(excess)
    if left(0) * left(far) > 0:
        return None
    return np.linalg.norm(np.clip(-brentq(left, 0, far, xtol=1e-15) * w, low, high))


@pytest.mark.parametrize(("norm", "smallest"), [("linf", smallest_linf), ("l2", smallest_l2)])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_a_move_is_the_smallest_that_reaches_the_plane(norm, smallest, size):
    t, w, excess = planes(40, size)
    moves = onto_hyperplane(norm, w, excess, -t, 1 - t)
    assert (t + moves).min() >= 0
    assert (t + moves).max() <= 1
    reached = 0
    for i in range(len(t)):
        expected = smallest(*(v.numpy() for v in (w[i], excess[i], -t[i], 1 - t[i])))
        left = float(w[i] @ moves[i] + excess[i])
        if expected is None:
            # As far as the box lets, on the same side of the plane.
            sign = excess[i].sign()
            corner = torch.where(w[i] * sign > 0, -t[i], 1 - t[i]) * (w[i] != 0)
            assert torch.equal(moves[i], corner)
            assert left * sign >= 0
            continue
        reached += 1
        assert left == pytest.approx(0, abs=1e-12)
        length = moves[i].abs().max() if norm == "linf" else moves[i].norm()
        assert float(length) == pytest.approx(expected, abs=1e-7)
    assert 5 < reached < 40


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("size", [1, 5, 64])
def test_moves_are_those_of_the_published_code(norm, size, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    published = getattr(fab_projections, f"projection_{norm}")
    t, w, excess = planes(200, size)
    torch.set_default_dtype(torch.float64)
    try:
        theirs = published(t, w, (w * t).sum(1) - excess)
    finally:
        torch.set_default_dtype(torch.float32)
    ours = onto_hyperplane(norm, w, excess, -t, 1 - t)
    assert (ours - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_by_tangents_are_those_by_sorting(dtype):
    generator = torch.Generator().manual_seed(3)
    for size in (1, 2, 100, 3072):
        # Weights of very different sizes need many tangents.
        weight = torch.randn(50, size, generator=generator).mul(3).exp().to(dtype)
        weight = torch.where(torch.rand(50, size, generator=generator) < 0.1, 0.0, weight)
        weight[:, 0] = 1
        ends = torch.rand(50, size, generator=generator).to(dtype)
        ends = torch.where(ends < 0.2, 0.0, ends)
        ends[:, 0] = 0.5
        share = torch.rand(50, generator=generator).to(dtype) * 0.99
        amount = (weight * ends).sum(1) * share
        tangents, sorting = (find(weight, ends, amount) for find in (by_tangents, by_sorting))
        torch.testing.assert_close(tangents, sorting, rtol=200 * torch.finfo(dtype).eps, atol=0)
        filled = (weight * torch.minimum(tangents[:, None], ends)).sum(1)
        torch.testing.assert_close(filled, amount, rtol=20 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("find", ["by_tangents", "by_sorting"])
def test_flat_planes_and_points_on_them_do_not_move(norm, find, monkeypatch):
    monkeypatch.setattr(
        "fastadv.evaluation.search.projections.by_tangents",
        {"by_tangents": by_tangents, "by_sorting": by_sorting}[find],
    )
    t, w, _ = planes(3, 8)
    excess = torch.tensor([0.0, 1.0, 0.0]).double()
    w[1:] = 0
    assert torch.equal(onto_hyperplane(norm, w, excess, -t, 1 - t), torch.zeros_like(t))
