"""The proposals of the Square attack in L2."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.evaluation.search import known, windows
from fastadv.evaluation.search.losses import TINY
from fastadv.evaluation.search.search import Images, State
from fastadv.evaluation.search.square_moves import Key, Moves, Start
from fastadv.evaluation.search.windows import WORD, Windows
from fastadv.threat import Threat

LEAST_SIDE = 3
CODES = 1 << 63  # that an int64 can tell apart


class L2Moves(Moves):
    """A proposal takes the part of the budget that is in two windows, and what is left of eps, and
    writes it into the first one: its pattern there, added to the one of ``windows.halves``. The
    start has a grid of such patterns.

    The name is that of the proposal and of the best point, by the number of better points so far.
    """

    def __init__(self, threat: Threat, seed: int, shape: tuple[int, int, int], queries: int):
        channels, height, width = shape
        sides = windows.sizes(queries, shape, LEAST_SIDE, odd=True)
        super().__init__(threat, seed, shape, Windows(sides, shape[1:], 2, bits=channels + 1))
        kinds = self.windows.kinds
        words = [1 << min(channels + 1, WORD)] + [1 << WORD] * (self.windows.words - 1)
        self.spans = (height, width, height, width, *words)
        codes = (queries + 2) * len(kinds)
        for span in self.spans:
            codes *= span
        self.names_are_exact = codes < CODES
        # By side, upright and transposed; the last row and column are the zeros around them.
        longest = max(kinds, default=0)
        patterns = torch.zeros(len(kinds), 2, longest + 1, longest + 1, dtype=torch.float64)
        for kind, side in enumerate(kinds):
            patterns[kind, 0, :side, :side] = windows.halves(side)
            patterns[kind, 1, :side, :side] = windows.halves(side).T
        self.patterns = patterns

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.patterns = self.patterns.to(device)

    def names(self, state: State, rows: Tensor, numbers: Tensor) -> Tensor:
        draws = state["draws"][rows[:, None], numbers]
        codes = state["better"][rows, None] * len(self.windows.kinds) + self.windows.kind[numbers]
        for span, value in zip(self.spans, draws.unbind(-1), strict=True):
            codes = codes * span + value % span
        return known.mixed(codes)

    def accepted(self, state: State, best: Tensor, better: Tensor, name: Tensor) -> State:
        return {"better": state["better"] + better}

    def _first(self, images: Images, key: Key) -> Start:
        x, (channels, height, width) = images.x, self.shape
        side = max(height // 5, 1)
        margin = max(height - side * 5, 0) // 2
        down, across = height // side, max(width // side, 1)
        bits = windows.uniform(images.index, (channels + 1, down, across), *key) >= 0.5
        rows, columns = (torch.arange(n, device=x.device) - margin for n in (height, width))
        row_tile, column_tile = rows // side, columns // side
        # The last windows of the grid end where the image ends.
        inside = ((rows >= 0) & (row_tile < down))[:, None]
        inside = inside & (columns >= 0) & (column_tile < across)
        bits = bits[:, :, row_tile.clamp(0, down - 1)[:, None], column_tile.clamp(0, across - 1)]
        pattern = windows.halves(side).to(x)
        at = (rows % side)[:, None], columns % side
        grid = torch.where(bits[:, channels:], pattern.T[at], pattern[at]) * inside
        signs = torch.where(bits[:, :channels], 1.0, -1.0).to(x.dtype)
        zeros = torch.zeros_like(images.index)
        return Start(self._moved(x, grid * signs), zeros, {"better": zeros})

    def _point(self, x: Tensor, best: Tensor, draws: Tensor, number: Tensor) -> Tensor:
        kind = self.windows.kind[number]
        delta = best - x
        squares = delta.square()
        first, second = (self.windows.mask(draws, kind, window) for window in (0, 1))
        in_first = (squares * first).sum((2, 3), keepdim=True)
        in_both = (squares * (first | second)).sum((2, 3), keepdim=True)
        unused = (self.threat.radius(x) ** 2 - squares.sum((1, 2, 3), keepdim=True)).clamp(min=0)
        added = self._pattern(draws, kind, x.dtype)[:, None] * self.signs(draws, x)
        new = added + delta * first / (in_first.sqrt() + TINY)
        new = new / (new.square().sum((2, 3), keepdim=True).sqrt() + TINY)
        new = new * (unused / len(x[0]) + in_both).sqrt()
        return self._moved(x, torch.where(first, new, delta.masked_fill(second, 0.0)))

    def _moved(self, x: Tensor, delta: Tensor) -> Tensor:
        """``x`` moved by eps in the direction of ``delta``."""
        length = delta.square().sum((1, 2, 3), keepdim=True).sqrt()
        return self.threat.clip(x + delta / (length + TINY) * self.threat.radius(x))

    def _pattern(self, draws: Tensor, kind: Tensor, dtype: torch.dtype) -> Tensor:
        """The pattern of each image at the place of its first window, (n,H,W)."""
        self.patterns = self.patterns.to(dtype)
        rows = self.windows.places[0][kind, self.windows.top(draws)]
        columns = self.windows.places[1][kind, self.windows.left(draws)]
        turned = self.windows.bits(draws, 1, first=self.shape[0])
        return self.patterns[
            kind[:, None, None], turned[:, :, None], rows[:, :, None], columns[:, None]
        ]
