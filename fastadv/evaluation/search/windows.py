"""Square windows of images: their sizes over a search, random places, masks and patterns."""

from __future__ import annotations

import math
from bisect import bisect_left

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


class Windows:
    """Random windows of images (H,W) of ``shape``: ``count`` in each iteration, with the sides
    ``sides`` (iterations,), and ``bits`` random bits.

    Draws are rows of numbers, int32: the first row and column of each window in turn, then words of
    24 bits.
    """

    def __init__(self, sides: list[int], shape: tuple[int, int], count: int, bits: int) -> None:
        self.shape, self.count = shape, count
        self.bit = torch.arange(bits)
        self.words = -(-bits // WORD)
        self.sides = torch.tensor(sides, dtype=torch.int64)
        self.kinds = sorted(set(sides))  # the different sides
        self.kind = torch.tensor([self.kinds.index(side) for side in sides], dtype=torch.int64)
        rows, columns = (torch.stack([_places(k, n) for k in self.kinds]) for n in shape)
        self.places = rows, columns
        self.inside = rows >= 0, columns >= 0

    def to(self, device: torch.device) -> None:
        """Keep the tables on ``device``."""
        self.sides, self.kind = self.sides.to(device), self.kind.to(device)
        self.bit = self.bit.to(device)
        self.places = self.places[0].to(device), self.places[1].to(device)
        self.inside = self.inside[0].to(device), self.inside[1].to(device)

    def draw(self, index: Tensor, seed: int, offset: int, stream: int) -> Tensor:
        """The draws (n,iterations,numbers) of the rows ``index`` (n,). A window's place is
        floor(U (H - s)), so that it never touches the last row unless it fills the image: as in the
        released code."""
        height, width = self.shape
        room = torch.stack([height - self.sides, width - self.sides] * self.count, 1)
        whole = room.new_full((len(room), self.words), 1 << WORD)
        span = torch.cat([room, whole], 1)
        return uniform(index, tuple(span.shape), seed, offset, stream).mul_(span).to(torch.int32)

    def top(self, draws: Tensor, window: int = 0) -> Tensor:
        """The first row of a window, for ``draws`` (...,numbers)."""
        return draws[..., 2 * window]

    def left(self, draws: Tensor, window: int = 0) -> Tensor:
        """The first column of a window."""
        return draws[..., 2 * window + 1]

    def bits(self, draws: Tensor, count: int, first: int = 0) -> Tensor:
        """``count`` random bits from number ``first`` on, 0 or 1, (...,count) int64."""
        words = draws[..., 2 * self.count :]
        number = self.bit[first : first + count]
        if self.words > 1:
            words, number = words[..., number // WORD], number % WORD
        return (words >> number) & 1

    def mask(self, draws: Tensor, kind: Tensor, window: int = 0) -> Tensor:
        """(n,1,H,W) bool: the pixels of a window, for ``draws`` (n,numbers); ``kind`` (n,): its
        side's number among the different ones."""
        rows = self.inside[0][kind, self.top(draws, window)]
        columns = self.inside[1][kind, self.left(draws, window)]
        return (rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def _places(side: int, length: int) -> Tensor:
    """(length,length): for a window whose first row is the first index, the row of the window that
    each row of the image is, or -1."""
    away = torch.arange(length) - torch.arange(length)[:, None]
    return torch.where((away >= 0) & (away < side), away, -1)


def uniform(index: Tensor, shape: tuple[int, ...], seed: int, offset: int, stream: int) -> Tensor:
    """float32 numbers (n,*shape) in [0,1) with 24 random bits each."""
    noise: Tensor = kernels.noise_uniform(index, shape, seed, offset, stream)
    return noise.add_(1).mul_(0.5)


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
