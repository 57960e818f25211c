"""PMA, the probability margin attack (Xie et al., 2024): first one of the two terms of the
probability margin, then the margin itself."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from fastadv.engine.noise import RESTART, noise_stream
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.search import Images, Search, Seen, State
from fastadv.threat import Threat

START = noise_stream("evaluation.pma")


class Pma(Search):
    """``steps`` projected steps from a random point of the ball, in two phases of half the steps.

    Phase one lowers p_y, in every second restart it raises max_{j != y} p_j; phase two raises their
    difference. In both the step falls from 2 eps to 0 along a cosine. In a targeted threat all
    objectives have the other sign.
    """

    name: ClassVar[str] = "pma"
    summary: ClassVar[str] = "the probability margin, in two phases (Xie et al., 2024)"
    default_segments: ClassVar[int] = 2

    def __init__(
        self,
        threat: Threat,
        seed: int = 0,
        segments: int | None = None,
        steps: int | None = None,
    ) -> None:
        super().__init__(threat, seed, segments, steps)
        self.exploring = self.steps // 2
        moves = sizes(self.exploring, self.steps)
        self._sizes = threat.nominal * torch.tensor(moves, dtype=torch.float64)

    def start(self, images: Images, segment: int) -> State:
        n, device = len(images.x), images.x.device
        shift = START.shift + segment * RESTART
        return {
            "point": self.threat.start(images.x, images.index, self.seed, shift, START.number),
            "raises_other": torch.full((n,), segment % 2 == 1, device=device),
            "iteration": torch.zeros(n, dtype=torch.int64, device=device),
        }

    def wants_gradient(self, state: State) -> Tensor:
        return state["iteration"] < self.steps

    def objective(self, logits: Tensor, state: State) -> Tensor:
        own, other = losses.own_and_other(logits.softmax(1), state["y"])
        one = torch.where(state["raises_other"], other, -own)
        raised = torch.where(state["iteration"] < self.exploring, one, other - own)
        return -raised if self.threat.targeted else raised

    def tell(self, state: State, seen: Seen) -> State:
        iteration = state["iteration"]
        self._sizes = self._sizes.to(iteration.device)
        size = self._sizes[iteration.clamp(max=self.steps)].to(state["x"].dtype)
        return {
            "point": self.threat.step(state["point"], seen.gradient, state["x"], size),
            "iteration": iteration + 1,
            "done": iteration >= self.steps,
        }


def sizes(exploring: int, steps: int) -> list[float]:
    """Sizes of ``steps`` moves in units of eps, and a last 0: 1 + cos(pi k/K) for move k of a phase
    of K; the first phase has ``exploring`` moves."""
    phases = (exploring, steps - exploring)
    return [1 + math.cos(math.pi * k / length) for length in phases for k in range(length)] + [0.0]
