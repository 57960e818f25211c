"""The proposals of the Square attack in L2."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.evaluation.search import known, windows
from fastadv.evaluation.search.losses import TINY
from fastadv.evaluation.search.search import Images, State
from fastadv.evaluation.search.square_moves import Moves, Proposal
from fastadv.threat import Threat

NAMED_WITHIN = 1 << 63  # codes above would not be different int64 numbers


class L2Moves(Moves):
    """A proposal takes the part of the budget that is in two windows, and what is left of eps, and
    writes it into the first one: its pattern there, added to the one of ``windows.halves``. The
    start has a grid of such patterns.

    The name is that of the proposal, and of the number of better points so far (``better``).
    """

    window_count = 2

    def __init__(self, threat: Threat, seed: int, shape: tuple[int, int, int], queries: int):
        channels, height, width = shape
        sides = windows.sizes(queries, shape, least=3, odd=True)
        super().__init__(threat, seed, shape, sides, bits=channels + 1)
        words = [1 << min(channels + 1, windows.WORD)]
        words += [1 << windows.WORD] * (self.drawn.words - 1)
        self.spans = (height, width, height, width, *words)
        codes = (queries + 2) * (max(sides, default=0) + 1)
        for span in self.spans:
            codes *= span
        self.names_are_exact = codes < NAMED_WITHIN
        # Patterns by side, upright and transposed, with zeros around them.
        longest = max(sides, default=0)
        self.patterns = torch.zeros(2 * (longest + 1), longest + 1, longest + 1)
        self.patterns = self.patterns.double()
        for side in set(sides):
            pattern = windows.halves(side)
            self.patterns[2 * side, :side, :side] = pattern
            self.patterns[2 * side + 1, :side, :side] = pattern.T
        self.outside = longest

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.patterns = self.patterns.to(device)

    def _first(self, images: Images, key: tuple[int, int, int]) -> Proposal:
        x, (channels, height, width) = images.x, self.shape
        side = max(height // 5, 1)
        margin = max(height - side * 5, 0) // 2
        down, across = height // side, width // side
        bits = windows.uniform(images.index, (channels + 1, down, across), *key) >= 0.5
        rows, columns = (torch.arange(length, device=x.device) for length in (height, width))
        rows, columns = rows - margin, columns - margin
        # The last windows of the grid end where the image ends.
        row_tile, column_tile = rows // side, columns // side
        inside = ((rows >= 0) & (row_tile < down))[:, None]
        inside = inside & (columns >= 0) & (column_tile < across)
        tile = (row_tile.clamp(0, down - 1)[:, None], column_tile.clamp(0, across - 1))
        pattern = windows.halves(side).to(x)
        upright = pattern[(rows % side)[:, None], columns % side]
        turned = pattern.T[(rows % side)[:, None], columns % side]
        bits = bits[:, :, tile[0], tile[1]]  # (n,C+1,H,W)
        signs = torch.where(bits[:, :channels], 1.0, -1.0).to(x.dtype)
        grid = torch.where(bits[:, channels:], turned, upright) * signs * inside
        zeros = torch.zeros_like(images.index)
        return Proposal(self._within(x, grid), {"better": zeros, "name": zeros})

    def _within(self, x: Tensor, delta: Tensor) -> Tensor:
        """``x`` moved by eps in the direction of ``delta``."""
        length = delta.square().sum((1, 2, 3), keepdim=True).sqrt()
        return self.threat.clip(x + delta / (length + TINY) * self.threat.radius(x))

    def _point(self, x: Tensor, best: Tensor, draws: windows.Draws, side: Tensor) -> Tensor:
        channels, height, width = self.shape
        delta = best - x
        squares = delta.square()
        first, second = (
            windows.mask(top, left, side, height, width)
            for top, left in zip(draws.tops, draws.lefts, strict=True)
        )
        in_first = (squares * first).sum((2, 3), keepdim=True)
        in_both = (squares * (first | second)).sum((2, 3), keepdim=True)
        unused = (self.threat.radius(x) ** 2 - squares.sum((1, 2, 3), keepdim=True)).clamp(min=0)
        added = self._pattern(draws, side, x.dtype)[:, None] * self.signs(draws, x)
        new = added + delta * first / (in_first.sqrt() + TINY)
        new = new / (new.square().sum((2, 3), keepdim=True).sqrt() + TINY)
        new = new * (unused / channels + in_both).sqrt()
        return self._within(x, torch.where(first, new, delta.masked_fill(second, 0.0)))

    def _pattern(self, draws: windows.Draws, side: Tensor, dtype: torch.dtype) -> Tensor:
        """The pattern of each image at the place of its first window, (n,H,W)."""
        if self.patterns.dtype != dtype:
            self.patterns = self.patterns.to(dtype)
        _, height, width = self.shape
        rows, columns = (
            self._place(first, side, length)
            for first, length in ((draws.tops[0], height), (draws.lefts[0], width))
        )
        which = 2 * side + draws.bit(self.shape[0])
        return self.patterns[which[:, None, None], rows[:, :, None], columns[:, None, :]]

    def _place(self, first: Tensor, side: Tensor, length: int) -> Tensor:
        """(n,length): the row (or column) of the pattern for each one of the image."""
        away = torch.arange(length, device=first.device) - first[:, None]
        return torch.where((away >= 0) & (away < side[:, None]), away, self.outside)

    def _names(self, state: State, rows: Tensor, draws: windows.Draws, side: Tensor) -> Tensor:
        places = (draws.tops[0], draws.lefts[0], draws.tops[1], draws.lefts[1])
        codes = state["better"][rows, None] * (self.outside + 1) + side
        for span, value in zip(self.spans, (*places, *draws.bits.unbind(-1)), strict=True):
            codes = codes * span + value % span
        return known.mixed(codes)

    def accepted(self, state: State, best: Tensor, better: Tensor) -> State:
        return {"better": state["better"] + better}
