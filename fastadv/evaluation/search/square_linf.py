"""The proposals of the Square attack in Linf."""

from __future__ import annotations

import torch
from torch import Tensor

from fastadv.evaluation.search import windows
from fastadv.evaluation.search.search import Images, State
from fastadv.evaluation.search.square_moves import Key, Moves, Start
from fastadv.evaluation.search.windows import Windows
from fastadv.threat import Threat


class LinfMoves(Moves):
    """Every pixel is at the distance eps from the image, or at the end of the box; a proposal gives
    one window the same sign in each channel. The start has vertical stripes.

    The name is that of the point, from whichever best point it is reached: the sum of random 64-bit
    keys of the values that are raised. Two points of one image have the same name with a
    probability below 10^-12. ``sums`` has those of the best point over all rows and columns before
    a place, so that the name of a proposal is read off the corners of its window.
    """

    def __init__(self, threat: Threat, seed: int, shape: tuple[int, int, int], queries: int):
        channels, _, width = shape
        sides = windows.sizes(queries, shape)
        super().__init__(threat, seed, shape, Windows(sides, shape[1:], 1, bits=channels))
        generator = torch.Generator().manual_seed(1)
        limits = torch.iinfo(torch.int64)
        self.keys = torch.randint(limits.min, limits.max, shape, generator=generator)
        self.key_sums = self._corner_sums(self.keys)  # (places,C)
        self.line = width + 1
        side = torch.tensor(sides, dtype=torch.int64)
        zeros = torch.zeros_like(side)
        across, down = side, side * self.line
        self.corners = torch.stack([zeros, across, down, across + down], 1)
        self.corner_signs = torch.tensor([1, -1, -1, 1])[:, None]

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.keys, self.key_sums = self.keys.to(device), self.key_sums.to(device)
        self.corners, self.corner_signs = self.corners.to(device), self.corner_signs.to(device)

    def names(self, state: State, rows: Tensor, numbers: Tensor) -> Tensor:
        draws = state["draws"][rows[:, None], numbers]
        top, left = self.windows.top(draws), self.windows.left(draws)
        at = (top * self.line + left)[..., None] + self.corners[numbers]  # (r,k,4)
        raised = self.windows.bits(draws, self.shape[0])[..., None, :] * self.key_sums[at]
        change = raised - state["sums"][rows[:, None, None], at]  # (r,k,4,C)
        return state["best_name"][rows, None] + (change * self.corner_signs).sum((2, 3))

    def accepted(self, state: State, best: Tensor, better: Tensor, name: Tensor) -> State:
        x, sums = state["x"], state["sums"]
        if self.reads_are_free:  # few points are better
            rows = better.nonzero().squeeze(1)
            if len(rows):
                sums[rows] = self._sums(x[rows], best[rows])
        else:
            sums = torch.where(better[:, None, None], self._sums(x, best), sums)
        return {"sums": sums, "best_name": torch.where(better, name, state["best_name"])}

    def _first(self, images: Images, key: Key) -> Start:
        x, (channels, _, width) = images.x, self.shape
        unit = windows.uniform(images.index, (channels, 1, width), *key)
        point = self._moved(x, torch.where(unit < 0.5, -1.0, 1.0).to(x.dtype))
        sums = self._sums(x, point)
        name = sums[:, -1].sum(1)
        return Start(point, name, {"sums": sums, "best_name": name})

    def _point(self, x: Tensor, best: Tensor, draws: Tensor, number: Tensor) -> Tensor:
        window = self.windows.mask(draws, self.windows.kind[number])
        return torch.where(window, self._moved(x, self.signs(draws, x)), best)

    def _moved(self, x: Tensor, signs: Tensor) -> Tensor:
        return self.threat.clip(x + signs * self.threat.radius(x))

    def _sums(self, x: Tensor, best: Tensor) -> Tensor:
        raised = best == self.threat.clip(x + self.threat.radius(x))
        return self._corner_sums(torch.where(raised, self.keys, 0))

    def _corner_sums(self, values: Tensor) -> Tensor:
        """The sums of ``values`` (...,C,H,W) before each corner of a pixel, (...,corners,C)."""
        return windows.area_sums(values).flatten(-2).transpose(-1, -2).contiguous()
