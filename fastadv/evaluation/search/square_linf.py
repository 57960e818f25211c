"""The proposals of the Square attack in Linf."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.evaluation.search import windows
from fastadv.evaluation.search.search import Images, State
from fastadv.evaluation.search.square_moves import Moves, Proposal
from fastadv.threat import Threat


class LinfMoves(Moves):
    """Every pixel is at the distance eps from the image, or at the end of the box; a proposal gives
    one window the same sign in each channel. The start has vertical stripes.

    The name is that of the point: the sum of random 64-bit keys of the values that are raised. Two
    points of one image have the same name with a probability below 10^-12. ``sums``: those of the
    best point over all rows and columns before a place, so that the name of a proposal is read off
    the corners of its window.
    """

    window_count = 1

    def __init__(self, threat: Threat, seed: int, shape: tuple[int, int, int], queries: int):
        super().__init__(threat, seed, shape, windows.sizes(queries, shape), bits=shape[0])
        generator = torch.Generator().manual_seed(1)
        limits = torch.iinfo(torch.int64)
        self.keys = torch.randint(limits.min, limits.max, shape, generator=generator)
        self.key_sums = windows.area_sums(self.keys).flatten()

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.keys, self.key_sums = self.keys.to(device), self.key_sums.to(device)

    def _first(self, images: Images, key: tuple[int, int, int]) -> Proposal:
        x, (channels, _, width) = images.x, self.shape
        unit = windows.uniform(images.index, (channels, 1, width), *key)
        signs = torch.where(unit < 0.5, -1.0, 1.0).to(x.dtype)
        point = self._moved(x, signs)
        sums = self._sums(x, point)
        name = sums.view(len(sums), channels, -1)[..., -1].sum(1)
        return Proposal(point, {"sums": sums, "name": name})

    def _moved(self, x: Tensor, signs: Tensor) -> Tensor:
        return self.threat.clip(x + signs * self.threat.radius(x))

    def _sums(self, x: Tensor, best: Tensor) -> Tensor:
        raised = best == self.threat.clip(x + self.threat.radius(x))
        return windows.area_sums(torch.where(raised, self.keys, 0)).flatten(1)

    def _point(self, x: Tensor, best: Tensor, draws: windows.Draws, side: Tensor) -> Tensor:
        window = windows.mask(draws.tops[0], draws.lefts[0], side, *self.shape[1:])
        return torch.where(window, self._moved(x, self.signs(draws, x)), best)

    def _names(self, state: State, rows: Tensor, draws: windows.Draws, side: Tensor) -> Tensor:
        channels, height, width = self.shape
        line, area = width + 1, (height + 1) * (width + 1)
        corner = draws.tops[0] * line + draws.lefts[0]
        below = corner + side * line
        corners = torch.stack([corner, corner + side, below, below + side], -1)  # (r,k,4)
        planes = torch.arange(channels, device=side.device)[:, None] * area
        at = corners[:, :, None] + planes  # (r,k,C,4)
        raised = draws.first_bits(channels)[..., None] * self.key_sums[at]
        sums = state["sums"]
        change = raised - sums.view(-1).take(at + (rows * sums.shape[1])[:, None, None, None])
        change = change.sum(2)
        moved = change[..., 0] - change[..., 1] - change[..., 2] + change[..., 3]
        best = sums.view(len(sums), channels, -1)[rows, :, -1].sum(1)
        return best[:, None] + moved

    def accepted(self, state: State, best: Tensor, better: Tensor) -> State:
        x, sums = state["x"], state["sums"]
        if better.is_cpu:  # reading costs nothing, and few points are better
            rows = better.nonzero().squeeze(1)
            if len(rows):
                sums[rows] = self._sums(x[rows], best[rows])
            return {}
        return {"sums": torch.where(better[:, None], self._sums(x, best), sums)}
