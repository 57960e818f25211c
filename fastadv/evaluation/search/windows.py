"""Square windows of images: their sizes over a search, random places, masks and patterns."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv import kernels

P_INIT = 0.8
HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
"""The last iterations before the share of changed pixels is halved, from ``P_INIT`` on."""
WORD = 24  # random bits of one number of the noise


def sizes(
    queries: int, shape: tuple[int, int, int], least: int = 1, *, odd: bool = False
) -> list[int]:
    """The side of the window in each iteration, for images (C,H,W): that of a square with the
    scheduled share of the pixels, at least ``least``, the next ``odd`` number, and at most the
    shorter side of the image (Andriushchenko et al., 2020, Sec. 4)."""
    channels, height, width = shape
    found = []
    for iteration in range(queries):
        share = P_INIT / 2 ** bisect_left(HALVED_AFTER, iteration)
        pixels = share * (channels * height * width) / channels  # rounded as in the released code
        side = max(round(math.sqrt(pixels)), least)
        if odd and side % 2 == 0:
            side += 1
        found.append(min(side, height, width))
    return found


class Draws(NamedTuple):
    """Random windows with signs. ``tops`` and ``lefts`` (...): the first row and column of each
    window. ``bits`` (...,words) int32: 24 random bits in each."""

    tops: tuple[Tensor, ...]
    lefts: tuple[Tensor, ...]
    bits: Tensor

    def bit(self, number: int) -> Tensor:
        """Random bit ``number`` as 0 or 1, (...)."""
        return (self.bits[..., number // WORD] >> number % WORD) & 1

    def first_bits(self, count: int) -> Tensor:
        """The first ``count`` bits as 0 or 1, (...,count) int32."""
        if count > WORD:
            return torch.stack([self.bit(number) for number in range(count)], -1)
        return (self.bits[..., :1] >> torch.arange(count, device=self.bits.device)) & 1


class Drawn:
    """Draws of all iterations, kept as int32 numbers (n,queries,fields)."""

    def __init__(self, sides: Tensor, shape: tuple[int, int], windows: int, bits: int) -> None:
        self.sides, self.shape, self.windows = sides, shape, windows
        self.words = -(-bits // WORD)

    def of(self, index: Tensor, seed: int, offset: int, stream: int) -> Tensor:
        """The numbers for the rows ``index`` (n,). A window's place is floor(U (H - s)), so that it
        never touches the last row unless it fills the image: as in the released code."""
        fields = 2 * self.windows + self.words
        unit = uniform(index, (len(self.sides), fields), seed, offset, stream)
        height, width = self.shape
        room = torch.stack([height - self.sides, width - self.sides] * self.windows, 1)
        whole = room.new_full((len(self.sides), self.words), 1 << WORD)
        return unit.mul_(torch.cat([room, whole], 1)).to(torch.int32)

    def draws(self, numbers: Tensor) -> Draws:
        """``numbers`` (...,fields) of the table by their meaning."""
        places = numbers[..., : 2 * self.windows].long().unbind(-1)
        return Draws(places[::2], places[1::2], numbers[..., 2 * self.windows :])


def uniform(index: Tensor, shape: tuple[int, ...], seed: int, offset: int, stream: int) -> Tensor:
    """float32 numbers (n,*shape) in [0,1) with 24 random bits each."""
    noise: Tensor = kernels.noise_uniform(index, shape, seed, offset, stream)
    return noise.add_(1).mul_(0.5)


def within(first: Tensor, side: Tensor, length: int) -> Tensor:
    """(n,length) bool: the rows (or columns) of the windows that begin at ``first`` (n,)."""
    away = torch.arange(length, device=first.device) - first[:, None]
    return (away >= 0) & (away < side[:, None])


def mask(top: Tensor, left: Tensor, side: Tensor, height: int, width: int) -> Tensor:
    """(n,1,H,W) bool: the pixels of the windows."""
    rows, columns = within(top, side, height), within(left, side, width)
    return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def area_sums(values: Tensor) -> Tensor:
    """Sums of ``values`` (...,H,W) over all rows and columns before each place: (...,H+1,W+1)."""
    padded = torch.nn.functional.pad(values, (1, 0, 1, 0))
    return padded.cumsum(-1).cumsum(-2)


def bump(height: int, width: int) -> Tensor:
    """A pattern (H,W) in float64 that falls from its centre: the sum over k >= d of 1/(k+1)^2, d
    the distance in rows or columns, whichever is larger (Andriushchenko et al., 2020, Alg. 3)."""
    down = (torch.arange(height) - height // 2).abs()
    across = (torch.arange(width) - width // 2).abs()
    last = max(height // 2, width // 2)
    terms = 1 / torch.arange(1, last + 2, dtype=torch.float64).square()
    tails = terms.flip(0).cumsum(0).flip(0)
    return tails[torch.maximum(down[:, None], across)]


def halves(side: int) -> Tensor:
    """The pattern of the L2 attack, (side,side) in float64 of norm 1: a bump in the upper half and
    a negative one in the lower half, each of the same norm."""
    upper, lower = bump(side // 2, side), bump(side - side // 2, side)
    both = torch.cat([upper / upper.norm() if side > 1 else upper, -lower / lower.norm()])
    return both / both.norm()
