"""What the Square attack proposes: a random start, then changes of the best point in one or two
random windows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from fastadv.engine.noise import RESTART, noise_stream
from fastadv.evaluation.search.search import Images, State
from fastadv.evaluation.search.windows import Windows
from fastadv.threat import Threat

NOISE = noise_stream("evaluation.square")
Key = tuple[int, int, int]
"""Seed, offset and stream of draws."""


class Start(NamedTuple):
    """``point`` (n,C,H,W), its ``name`` (n,), and what the moves keep in the state."""

    point: Tensor
    name: Tensor
    state: State


class Moves(ABC):
    """Start and proposals for images (C,H,W) of ``shape``.

    A proposal has a *name*, an int64 number. A second proposal of the same name is the point of the
    first, seen from the same best point or from an earlier one.
    """

    names_are_exact = True
    reads_are_free = True  # False on a device: a value that is read stops its queue

    def __init__(self, threat: Threat, seed: int, shape: tuple[int, int, int], windows: Windows):
        self.threat, self.seed, self.shape, self.windows = threat, seed, shape, windows

    def to(self, device: torch.device) -> None:
        """Keep constants on ``device``."""
        self.windows.to(device)
        self.reads_are_free = device.type == "cpu"

    def start(self, images: Images, segment: int) -> Start:
        """The beginning of run ``segment``."""
        offset = NOISE.shift + segment * RESTART
        draws = self.windows.draw(images.index, self.seed, offset + 1, NOISE.number)
        point, name, state = self._first(images, (self.seed, offset, NOISE.number))
        return Start(point, name, {"draws": draws, **state})

    def point(self, state: State, best: Tensor, number: Tensor) -> Tensor:
        """Proposal ``number`` (n,) to change ``best``."""
        rows = torch.arange(len(number), device=number.device)
        return self._point(state["x"], best, state["draws"][rows, number], number)

    def signs(self, draws: Tensor, like: Tensor) -> Tensor:
        """A sign for each channel, (n,C,1,1)."""
        bits = self.windows.bits(draws, self.shape[0])
        return (2 * bits - 1).to(like.dtype)[:, :, None, None]

    @abstractmethod
    def names(self, state: State, rows: Tensor, numbers: Tensor) -> Tensor:
        """The names (r,k) of the proposals ``numbers`` (r,k) for the images ``rows`` (r,)."""

    @abstractmethod
    def accepted(self, state: State, best: Tensor, better: Tensor, name: Tensor) -> State:
        """What changes in the state, apart from ``best``, where it is ``better`` (n,) bool: the
        proposal called ``name`` (n,)."""

    @abstractmethod
    def _first(self, images: Images, key: Key) -> Start: ...

    @abstractmethod
    def _point(self, x: Tensor, best: Tensor, draws: Tensor, number: Tensor) -> Tensor: ...
