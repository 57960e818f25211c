"""``quick``: how robust a network is, to about a point of what AutoAttack says, for less than
PGD-50.

It is for choosing the best epoch of a run, not for a table. Three things save passes. An image
leaves once it is fooled. The probability margin (Xie et al., 2024) falls as far in ten steps of a
falling size as other losses in many. And an image is given up whose margin has fallen less than
those of the others: later runs are for those that came nearer to the boundary.
"""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from fastadv.engine.noise import RESTART, noise_stream
from fastadv.evaluation.search import losses
from fastadv.evaluation.search.search import Images, Search, Seen, State, at, choose
from fastadv.threat import Threat

START = noise_stream("evaluation.quick")
MARGIN, CE = -1, -2  # in place of a rank: objectives without a target


class Run(NamedTuple):
    """``steps`` moves from a random point, whose size falls from ``reach`` eps to 0 along a cosine.
    They raise the probability margin, the cross entropy, or z_t - z_y for the other class t of this
    ``rank`` (0: the largest logit) at the strongest point of the first run. After it an image goes
    on if its smallest margin is below ``near`` times the one it had at first."""

    steps: int
    rank: int
    near: float
    reach: float = 1.0


RUNS = (
    Run(10, MARGIN, 0.75, reach=2.0),
    Run(10, 1, 0.6),
    Run(10, 2, 0.5),
    Run(10, 3, 0.4),
    Run(10, CE, 0.35),
    Run(10, MARGIN, 0.25),
    Run(20, 1, 0.2),
    Run(20, 2, 0.15),
    Run(20, 0, 0.1),
    Run(20, MARGIN, 0.1),
    Run(20, CE, 0.08),
    Run(20, 3, 0.08),
    Run(20, MARGIN, 0.08),
    Run(20, MARGIN, 0.0),
)
"""Chosen on small networks for digits (``bench/quick_attack.py``). The margin leads to one class
and stays with it: what a first run misses is mostly found on the way to the second and third
nearest class, and the rest by further runs of the images near the boundary."""


class Quick(Search):
    """The ``RUNS``, each for the images that those before it brought near the boundary and did not
    take across it."""

    name: ClassVar[str] = "quick"
    summary: ClassVar[str] = (
        "short runs on the probability margin, for images near the boundary: to choose an epoch"
    )
    remembers: tuple[str, ...] = ("least", "strongest")
    takes_numbers: ClassVar[bool] = False
    takes_targets: ClassVar[bool] = False

    def __init__(
        self,
        threat: Threat,
        seed: int = 0,
        segments: int | None = None,
        steps: int | None = None,
        runs: tuple[Run, ...] = RUNS,
    ) -> None:
        super().__init__(threat, seed, len(runs), max(run.steps for run in runs))
        self._runs = {
            "steps": torch.tensor([run.steps for run in runs]),
            "rank": torch.tensor([run.rank for run in runs]),
            "near": torch.tensor([run.near for run in runs], dtype=torch.float64),
            "reach": torch.tensor([run.reach for run in runs], dtype=torch.float64),
        }

    def start(self, images: Images, segment: int) -> State:
        shift = START.shift + segment * RESTART
        return {
            "point": self.threat.start(images.x, images.index, self.seed, shift, START.number),
            "iteration": torch.zeros(len(images.x), dtype=torch.int64, device=images.x.device),
            "least": -losses.margin(images.logits, images.y),
            "strongest": images.logits,  # the logits at the first run's strongest point
        }

    def wants_gradient(self, state: State) -> Tensor:
        return state["iteration"] < self._of_run(state, "steps")

    def objective(self, logits: Tensor, state: State) -> Tensor:
        y, rank = state["y"], self._of_run(state, "rank")
        own = y[:, None] == torch.arange(logits.shape[1], device=y.device)
        ranked = state["strongest"].masked_fill(own, -float("inf")).argsort(dim=1, descending=True)
        target = at(ranked, rank.clamp(min=0) % (logits.shape[1] - 1))
        aimed = losses.of_class(logits, target) - losses.of_class(logits, y)
        free = torch.where(rank == CE, losses.ce(logits, y), losses.probability_margin(logits, y))
        return torch.where(rank < 0, free, aimed)

    def tell(self, state: State, seen: Seen) -> State:
        iteration, steps = state["iteration"], self._of_run(state, "steps")
        x = state["x"]
        # At the end of a run the size is 0, and the point stays where it is.
        share = (iteration.double() / steps).clamp(max=1)
        size = self._of_run(state, "reach") * (1 + torch.cos(math.pi * share)) / 2
        margin = -losses.margin(seen.logits, state["y"])
        nearer = margin < state["least"]
        return {
            "point": self.threat.step(
                state["point"], seen.gradient, x, self.threat.nominal * size.to(x.dtype)
            ),
            "iteration": iteration + 1,
            "least": torch.where(nearer, margin, state["least"]),
            "strongest": choose(nearer & (state["segment"] == 0), seen.logits, state["strongest"]),
            "done": iteration >= steps,
        }

    def goes_on(self, state: State) -> Tensor:
        first = -losses.margin(state["logits"], state["y"])
        return state["least"] < self._of_run(state, "near") * first

    def _of_run(self, state: State, what: str) -> Tensor:
        """(n,): the number ``what`` of the run that each image is in."""
        segment = state["segment"]
        self._runs[what] = self._runs[what].to(segment.device)
        return self._runs[what][segment]
