"""What the Square attack proposes: a random start, then changes of the best point in one or two
random windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.engine.noise import RESTART, noise_stream
from fastadv.evaluation.search import windows
from fastadv.evaluation.search.search import Images, State
from fastadv.threat import Threat

NOISE = noise_stream("evaluation.square")


class Proposal(NamedTuple):
    """``point`` (n,C,H,W), and what it adds to the state."""

    point: Tensor
    state: State


class Moves(ABC):
    """The proposals for images (C,H,W) of ``shape``.

    A proposal has a *name*, an int64 number: two proposals with the same name are the same point,
    or one of them is a point that was seen before and is no better than the best one now.
    """

    window_count: int  # in a proposal
    names_are_exact = True

    def __init__(
        self, threat: Threat, seed: int, shape: tuple[int, int, int], sides: list[int], bits: int
    ) -> None:
        self.threat, self.seed, self.shape = threat, seed, shape
        self.sides = torch.tensor(sides)
        self.drawn = windows.Drawn(self.sides, shape[1:], self.window_count, bits)

    def to(self, device: torch.device) -> None:
        """Keep constants on ``device``."""
        self.sides = self.drawn.sides = self.sides.to(device)

    def start(self, images: Images, segment: int) -> Proposal:
        """The first point of run ``segment``."""
        offset = NOISE.shift + segment * RESTART
        draws = self.drawn.of(images.index, self.seed, offset + 1, NOISE.number)
        first = self._first(images, (self.seed, offset, NOISE.number))
        return Proposal(first.point, {"draws": draws, **first.state})

    def point(self, state: State, best: Tensor, number: Tensor) -> Tensor:
        """Proposal ``number`` (n,) to change ``best``."""
        rows = torch.arange(len(number), device=number.device)
        draws = self.drawn.draws(state["draws"][rows, number])
        return self._point(state["x"], best, draws, self.sides[number])

    def names(self, state: State, rows: Tensor, numbers: Tensor) -> Tensor:
        """The names (r,k) of the proposals ``numbers`` (r,k) for the images ``rows`` (r,)."""
        draws = self.drawn.draws(state["draws"][rows[:, None], numbers])
        return self._names(state, rows, draws, self.sides[numbers])

    def signs(self, draws: windows.Draws, like: Tensor) -> Tensor:
        """A sign for each channel, (n,C,1,1)."""
        bits = draws.first_bits(self.shape[0])
        return (2 * bits - 1).to(like.dtype)[:, :, None, None]

    @abstractmethod
    def _first(self, images: Images, key: tuple[int, int, int]) -> Proposal: ...

    @abstractmethod
    def _point(self, x: Tensor, best: Tensor, draws: windows.Draws, side: Tensor) -> Tensor: ...

    @abstractmethod
    def _names(self, state: State, rows: Tensor, draws: windows.Draws, side: Tensor) -> Tensor: ...

    @abstractmethod
    def accepted(self, state: State, best: Tensor, better: Tensor) -> State:
        """What changes in the state, apart from ``best``, where it became ``better`` (n,) bool."""
