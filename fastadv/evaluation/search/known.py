"""A set of names for each image: which points its search has asked about."""

from __future__ import annotations

import torch
from torch import Tensor

PLACES = 1 << 13
"""Names that are kept for one image, 64 KiB. Each has one place; a newer one takes it."""


def empty(count: int, device: torch.device) -> Tensor:
    """Empty sets (n,PLACES) int64."""
    # No name belongs to a place with these last bits.
    places = torch.arange(1, PLACES + 1, device=device)
    return places.expand(count, -1).clone()


def add(names: Tensor, sets: Tensor) -> None:
    """Put one name (n,) int64 into each of ``sets``, in place: a copy would be of 64 KiB for 8
    bytes."""
    sets.scatter_(1, _place(names)[:, None], names[:, None])


def contains(names: Tensor, sets: Tensor, rows: Tensor) -> Tensor:
    """(r,k) bool: whether ``names`` (r,k) are in the sets number ``rows`` (r,). A name whose place
    a newer one has taken is not found."""
    return sets.view(-1).take(_place(names) + rows[:, None] * PLACES) == names


def _place(names: Tensor) -> Tensor:
    return names & (PLACES - 1)


def mixed(codes: Tensor) -> Tensor:
    """A name for each of ``codes`` (...) int64. Different codes have different names, and the last
    bits of a name, which are its place, depend on all bits of the code."""
    scrambled = codes * -7046029254386353131  # odd, so that the product can be undone
    return scrambled ^ ((scrambled >> 32) & 0xFFFFFFFF)
