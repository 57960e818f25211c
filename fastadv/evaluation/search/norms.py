"""Norms of batches of vectors, an image each."""

from __future__ import annotations

from torch import Tensor

from fastadv.evaluation.search.losses import TINY
from fastadv.evaluation.search.search import by_image


def length(vectors: Tensor) -> Tensor:
    """The L2 norms (n,) of ``vectors`` (n,...)."""
    return vectors.flatten(1).square().sum(1).sqrt()


def direction(vectors: Tensor) -> Tensor:
    """``vectors`` (n,...) divided by their L2 norms."""
    return vectors / by_image(length(vectors) + TINY, vectors)


def size(norm: str, moves: Tensor) -> Tensor:
    """The norms (n,) of ``moves`` (n,...) in ``norm``, "linf" or "l2"."""
    return moves.flatten(1).abs().amax(1) if norm == "linf" else length(moves)


def slope(norm: str, gradient: Tensor) -> Tensor:
    """The norms (n,) of ``gradient`` (n,...) that are dual to ``norm``: how much a linear function
    changes over a distance of 1. L1 for "linf", L2 for "l2"."""
    return gradient.flatten(1).abs().sum(1) if norm == "linf" else length(gradient)
